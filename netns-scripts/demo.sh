#!/usr/bin/env bash
# demo.sh [--keep | --down]: a three-node mesh on this machine, shown step by step.
#
#      node a                node b                node c               host x
#  +-------------+       +-------------+       +-------------+      +-------------+
#  | meshd       |       | meshd       |       | meshd       |      | kernel's    |
#  |   server    |       |   agent     |       |   agent     |      |             |
#  | mesh0       |       | mesh0       |       | mesh0       |      | vxlan0      |
#  |  10.42.0.1  |       |  10.42.1.1  |       |  10.42.2.1  |      |  10.42.4.1  |
#  |             |       |             |       |             |      |             |
#  | ul0         |       | ul0         |       | ul0         |      | ul0         |
#  |  10.9.0.1   |       |  10.9.0.2   |       |  10.9.0.3   |      |  10.9.0.4   |
#  +------+------+       +------+------+       +------+------+      +------+------+
#         |                     |                     |                    |
#  =======+=====================+=====================+====================+=======  br0
#
# Each box is a network namespace. a serves the control plane, b and c join it with a
# token, and what they send each other is encrypted; x is a stranger first, and a
# member in the end.
# Nothing outside these namespaces is touched, and all of it goes away again, also on
# Ctrl-C and on errors. --keep leaves the mesh up, --down removes one that was kept.
# Exit code 0 only when every step held.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
KEPT=/run/meshd-demo

keep_wanted=''
case ${1:-} in
'') ;;
--keep) keep_wanted=1 ;;
--down) ;;
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
*) echo "usage: demo.sh [--keep | --down]" >&2; exit 2 ;;
esac
need_root "$@"

bring_down_kept() {
    local kind what
    [ -r "$KEPT" ] || { say "no demo is up"; return 0; }
    while read -r kind what; do
        case $kind in
        process) PIDS+=("$what") ;;
        namespace) NSS+=("$what") ;;
        directory) LAB=$what ;;
        esac
    done <"$KEPT"
    take_down
    case $LAB in */meshd-lab-*) rm -rf "$LAB" ;; esac
    rm -f "$KEPT"
    say "the demo is down"
}
if [ "${1:-}" = --down ]; then
    bring_down_kept
    exit
fi
[ ! -e "$KEPT" ] || [ -z "$keep_wanted" ] || die "a demo is already up: demo.sh --down removes it"

broken() { # TEXT
    local f
    printf '   %sFAILED%s  %s\n' "$RED" "$PLAIN" "$*" >&2
    for f in "$LAB"/*/meshd.log; do
        [ -s "$f" ] || continue
        printf '%s--- log of meshd on node %s\n' "$CLEAR" "$(basename "$(dirname "$f")")" >&2
        tail -n 15 "$f" >&2
    done
    exit 1
}

# ------------------------------------------------------------------------

lab_begin
step "What is needed"
need ip:iproute2 bridge:iproute2 ss:iproute2 ping:iputils-ping
want iperf3:iperf3 || note "going on without iperf3, with a small generator of our own"
need_namespaces
need_tun
build
good "$("$MESHD" --version 2>/dev/null || echo meshd) on Linux $(uname -r)"

step "A server: node a"
switch_add || broken "no bridge"
i=0
for n in a b c; do
    i=$((i + 1))
    { node_add $n $i && plug $n; } || broken "no namespace for node $n"
done
{ node_add x 4 && plug x; } || broken "no namespace for x"
v6_cidr=''
! have_v6 || v6_cidr=', "fd42::/48"'
start_member a server "cluster-cidr: [10.42.0.0/16$v6_cidr]" # meshd starts mesh-sidecar by itself
meshd_ready a || broken "the server did not come up"
good "meshd server: data plane on UDP $(underlay a):8472, control plane on https://$(underlay a):9345"
token=$(ctl a token create --ttl 1h --uses 2) || broken "no token"
say "   ${DIM}meshctl token create --ttl 1h --uses 2$PLAIN"
say "   ${token:0:24}… (${#token} characters: who the servers are, what their certificate is, a secret)"

step "Two agents: b and c join with the token, and with nothing else"
started=$(date +%s%N)
for n in b c; do MESHD_TOKEN=$token start_member $n agent; done
meshd_ready b c || broken "the agents did not join"
good "both joined and ready after $((($(date +%s%N) - started) / 1000000)) ms"
peers_of() { [ "$(ctl "$1" peers --json | grep -o '"endpoint"' | wc -l)" = "$2" ]; }
for n in a b c; do wait_for 5 peers_of $n 2 || broken "$n does not know both others"; done
learn a a b c || broken "meshctl nodes"
for n in a b c; do good "node $n: underlay $(underlay $n), overlay $(overlay $n), subnet $(subnet $n)"; done
if MESHD_TOKEN=$token load_on x 5 "$LAB/third" "$MESHD" agent --node-name x --node-ip "$(underlay x)" --data-dir "$LAB/x" \
    --socket "$LAB/x.sock" 2>/dev/null; then broken "a third node joined with a token for two"; fi
grep -q 'used up' "$LAB/third.err" || broken "a third node was not told why: $(cat "$LAB/third.err")"
good "a third node is refused: $(grep -o 'the token .* is used up' "$LAB/third.err" | head -n1)"
say "   ${DIM}meshctl nodes$PLAIN"
ctl b nodes | sed 's/^/   /' || broken "meshctl nodes"

step "Ping between all pairs"
for from in a b c; do
    for to in a b c; do
        [ $from != $to ] || continue
        for family in 4 6; do
            [ $family = 4 ] || have_v6 || continue
            load_on $from 10 "$LAB/ping" ping -n -q -c3 -i 0.05 -W2 "$(overlay $to $family)" || broken "$from cannot reach $(overlay $to $family) on $to"
        done
        good "$from to $to: $(grep -o 'rtt .*\|[0-9]* received' "$LAB/ping" | tail -n1 | sed 's|rtt min/avg/max/mdev = [^/]*/\([^/]*\)/.*|\1 ms|')"
    done
done

step "TCP between all pairs, one second each"
bulk() { # FROM TO: sets GBPS
    local dst server
    dst=$(overlay "$2")
    if command -v iperf3 >/dev/null; then
        spawn "$2" "$LAB/iperf-server" timeout 20 iperf3 -s -1 -B "$dst"
        server=$LAST
        wait_for 3 listening "$2" 5201
        load_on "$1" 10 "$LAB/iperf" iperf3 -c "$dst" -C cubic -t 1 -f g
        end_processes "$server"
        GBPS=$(awk '/receiver/{for (i = 2; i <= NF; i++) if ($i == "Gbits/sec") print $(i - 1)}' "$LAB/iperf")
    else
        load 10 "$LAB/iperf" "$LOADGEN" tcp "from=$RUN-$1" "to=$RUN-$2" "dst=$dst" secs=1
        GBPS=$(json_num gbps <"$LAB/iperf")
    fi
    [ -n "$GBPS" ] && awk -v g="$GBPS" 'BEGIN{exit !(g > 0.01)}'
}
command -v iperf3 >/dev/null || build_loadgen
printf '   Gbit/s    to a    to b    to c\n'
for from in a b c; do
    row=$(printf '   from %s' $from)
    for to in a b c; do
        if [ $from = $to ]; then
            row+=$(printf '%8s' -)
        else
            bulk $from $to || { cat "$LAB"/iperf* >&2; broken "no TCP from $from to $to"; }
            row+=$(printf '%8s' "$GBPS")
        fi
    done
    say "$row"
done

step "What node a says"
say "   ${DIM}meshctl peers$PLAIN"
ctl a peers | sed 's/^/   /' || broken "meshctl peers"
say
say "   ${DIM}meshctl stats$PLAIN"
ctl a stats | sed 's/^/   /' || broken "meshctl stats"

dropped() { ctl "$1" stats --json | json_num unknown_source; }
step "A stranger's packets are dropped, and counted"
before=$(dropped a)
[ -n "$before" ] || broken "meshctl stats --json has no unknown_source"
if have_kernel_vxlan; then
    kernel_vxlan_node x 4 a b c || broken "no kernel VXLAN device in x"
    note "x has a kernel VXLAN device with the right VNI, port and MAC addresses, but is in nobody's node list"
    if load_on x 10 "$LAB/ping" ping -n -q -c5 -i 0.1 -W1 "$(overlay a)"; then broken "x got an answer"; fi
    sent=5
else
    note "no kernel VXLAN device here: x sends a bare VXLAN header"
    # shellcheck disable=SC2016
    on x bash -c 'for i in 1 2 3 4 5; do printf "\x08\0\0\0\0\0\x01\0" >/dev/udp/$1/8472; done' bash "$(underlay a)"
    sent=5
fi
enough() { [ $(($(dropped a) - before)) -ge $sent ]; }
wait_for 3 enough || broken "a counted $(($(dropped a) - before)) packets from an unknown source, not $sent"
good "no answer for x; node a dropped $(($(dropped a) - before)) packets as unknown_source"

step "x becomes a member while traffic runs"
spawn b "$LAB/long-ping" timeout -s INT 30 ping -n -q -c 80 -i 0.05 "$(overlay c)"
long=$LAST
sleep 0.5
x_mac=$(vtep_mac x)
ctl a node add x --underlay "$(underlay x)" --mac "$x_mac" --subnet "$(subnet x)$(! have_v6 || printf ',%s' "$(subnet x 6)")" |
    sed 's/^/   /' || broken "meshctl node add"
if have_kernel_vxlan; then
    note "as it is: a kernel VXLAN device is a node like any other, but for its traffic, which nobody encrypts"
else
    write_nodes 4 a b c x
    start_meshd x 4 'encryption: none'
    meshd_ready x || broken "meshd on x did not come up"
fi
for n in a b c; do
    wait_for 10 pings x "$(overlay $n)" || broken "x is in the node list, but cannot reach $n"
    wait_for 3 pings $n "$(overlay x)" || broken "$n cannot reach x"
done
good "x reaches a, b and c, and they reach x"
bulk a x || broken "no TCP from a to x"
to_x=$GBPS
bulk x a || broken "no TCP from x to a"
good "TCP a to x $to_x Gbit/s, x to a $GBPS Gbit/s"
wait "$long"
forget "$long"
loss=$(grep -o '[0-9]* received.*loss' "$LAB/long-ping")
case $loss in
"80 received, 0% packet loss") good "meanwhile b to c: $loss of 80" ;;
*) broken "b to c lost packets during the change: $(cat "$LAB/long-ping")" ;;
esac
say "   ${DIM}meshctl peers$PLAIN"
ctl a peers | sed 's/^/   /' || broken "meshctl peers"

step "The control plane dies; nobody notices"
spawn b "$LAB/no-server" timeout -s INT 30 ping -n -q -c 60 -i 0.05 "$(overlay c)"
long=$LAST
sleep 0.5
end_processes "${DAEMON[a]}"
no_server() { ctl b status | grep -q 'no server answers'; }
wait_for 10 no_server || broken "b does not say that no server answers"
ctl b status >/dev/null || broken "b is not ready without a server"
wait "$long"
forget "$long"
case $(grep -o '[0-9]* received.*loss' "$LAB/no-server") in
"60 received, 0% packet loss") good "no server answers, and b to c lost 0 of 60 packets" ;;
*) broken "b to c lost packets: $(cat "$LAB/no-server")" ;;
esac
spawn a "$LAB/a/meshd.log" "$MESHD" server --config "$LAB/a/config.yaml"
DAEMON[a]=$LAST
meshd_ready a || broken "the server did not come back"
has_server() { ctl b status | grep -q 'member, server https'; }
wait_for 20 has_server || broken "b does not find its server again"
good "the server is back, with everything that it had promised"

step "c is removed"
ctl a node remove c | sed 's/^/   /' || broken "meshctl node remove"
wait_for 5 peers_of c 0 || broken "c still has peers"
if pings b "$(overlay c)"; then broken "b still reaches c"; fi
good "nobody talks to c any more: $(ctl c status | grep -o 'was removed from the cluster' | head -n1)"

if [ -n "$keep_wanted" ]; then
    {
        for p in "${PIDS[@]}"; do ! running "$p" || printf 'process %s\n' "$p"; done
        printf 'namespace %s\n' "${NSS[@]}"
        printf 'directory %s\n' "$LAB"
    } >"$KEPT"
    KEEP=1
    say
    say "The mesh stays up. To enter a node, look at it, and remove all of it:"
    say "   ip netns exec $RUN-a bash"
    say "   $MESHCTL --socket $LAB/a/meshd.sock peers --watch"
    say "   $0 --down"
else
    step "Taking it down"
    take_down
    good "no namespace, process or file is left"
fi
say
say "${GREEN}every step held$PLAIN"
