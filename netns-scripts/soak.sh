#!/usr/bin/env bash
# soak.sh [PACKETS | --minutes N]: mixed traffic between three nodes until so many packets
# (1000000 unless said; 100000000 takes four minutes on two cores) were carried, or for
# so long. Then all stops, and the books must balance:
#
#   on each node   in + originated = out + dropped + consumed, both ways, exactly
#   all nodes      datagrams sent = datagrams received + what the kernel says it lost
#   each process   as many descriptors as after the first rounds, and no more memory than half way
#
#      node a                node b                node c
#  +-------------+       +-------------+       +-------------+
#  | meshd mesh0 |       | meshd mesh0 |       | meshd mesh0 |
#  | ul0         |       | ul0         |       | ul0         |
#  +------+------+       +------+------+       +------+------+
#         |                     |                     |
#  =======+=====================+=====================+=======  br0
#
# Traffic, in turn over all pairs: TCP and UDP over IPv4 and IPv6, streams and small
# packets, pings that must be cut or do not fit, foreign sources, datagrams that are no
# VXLAN. Each box is a network namespace, removed in the end. Exit code 0 only when nothing is unaccounted for.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PACKETS=1000000 MINUTES=
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
--minutes) MINUTES=${2:-} PACKETS= ;;
'') ;;
*) PACKETS=$1 ;;
esac
case $PACKETS$MINUTES in '' | *[!0-9]*) echo "usage: soak.sh [PACKETS | --minutes N]" >&2; exit 2 ;; esac
need_root "$@"
NODES=(a b c)
ROUND=${ROUND:-4} # seconds
JUNK=50         # datagrams a round that no meshd sent

lab_begin
need ip:iproute2 iperf3:iperf3 jq:jq ping:iputils-ping
need_namespaces
need_tun
build
switch_add || die "no bridge"
i=0
for n in "${NODES[@]}"; do
    i=$((i + 1))
    { node_add "$n" $i && plug "$n"; } || die "no namespace for node $n"
done
write_nodes 4 "${NODES[@]}"
# a believes in more room than there is: its packets must be cut or answered
# nodes that ask each other all the time are never at rest, and the books of all of them are one sum
start_meshd a 4 "mtu: 1500" "bfd: off"
for n in b c; do start_meshd $n 4 "bfd: off"; done
for n in "${NODES[@]}"; do ip -n "$RUN-$n" addr add 192.0.2.1/32 dev lo; done
meshd_ready "${NODES[@]}" || die "the mesh did not come up"
for n in "${NODES[@]}"; do
    for port in 5201 5202 5203; do spawn "$n" /dev/null iperf3 -s -p $port; done
done
sleep 0.3

carried() { # packets that all nodes read from their TUN devices
    local n
    for n in "${NODES[@]}"; do ctl "$n" stats --json; done | jq -s 'map(.outbound.in) | add'
}
process() { # NODE: the pid of meshd; ip netns exec runs it in its own place
    printf '%s' "${DAEMON[$1]}"
}
fds() { find "/proc/$(process "$1")/fd" -mindepth 1 | wc -l; }
half='' # whether half of it is done
half_way() {
    if [ -n "$MINUTES" ]; then [ $((SECONDS - t0)) -ge $((MINUTES * 30)) ]; else [ "$done_packets" -ge $((PACKETS / 2)) ]; fi
}
rss() { awk '/^VmRSS/{print $2}' "/proc/$(process "$1")/status"; }

one_round() { # FROM TO
    local from=$1 to=$2 v4 v6 jobs=() p
    v4=$(overlay "$to") v6=$(overlay "$to" 6)
    have_v6 || v6=$v4
    start() {
        spawn "$from" /dev/null timeout -k 2 $((ROUND + 5)) "$@"
        jobs+=("$LAST")
    }
    start iperf3 -c "$v4" -p 5201 -t "$ROUND" -P 2 -C cubic
    start iperf3 -c "$v6" -p 5202 -t "$ROUND" -C cubic -R
    start iperf3 -c "$v4" -p 5203 -t "$ROUND" -u -b 150M -l $((RANDOM % 1300 + 64))
    start ping -n -q -i 0.01 -c $((ROUND * 50)) -s 56 "$v6"
    start ping -n -q -i 0.02 -c $((ROUND * 25)) -s 4000 "$v4"
    start ping -n -q -i 0.05 -c $((ROUND * 10)) -M "do" -s 4000 "$v4"
    start ping -n -q -i 0.05 -W 1 -c $((ROUND * 10)) -M "do" -s 1472 "$v4"
    start ping -n -q -i 0.05 -W 1 -c $((ROUND * 10)) -I 192.0.2.1 "$v4"
    # no VXLAN at all, from a member's address
    # shellcheck disable=SC2016
    start bash -c 'for i in $(seq "$1"); do printf nonsense >"/dev/udp/$2/8472"; done' bash $JUNK "$(underlay "$to")"
    for p in "${jobs[@]}"; do
        wait "$p" 2>/dev/null
        forget "$p"
    done
}

step "Traffic"
pairs=(a:b b:c c:a b:a c:b a:c)
declare -A FDS0 RSS0
round=0 done_packets=0 t0=$SECONDS
while :; do
    pair=${pairs[$((round % 6))]}
    one_round "${pair%:*}" "${pair#*:}"
    round=$((round + 1))
    done_packets=$(carried) || die "meshctl stats failed"
    if [ $round = 6 ]; then
        for n in "${NODES[@]}"; do FDS0[$n]=$(fds "$n"); done
    fi
    # buffers are touched when they are first needed: half of the way has needed them all
    if [ -z "$half" ] && [ $round -ge 6 ] && half_way; then
        half=1
        for n in "${NODES[@]}"; do RSS0[$n]=$(rss "$n"); done
    fi
    [ $((round % 6)) != 0 ] || note "$done_packets packets in $((SECONDS - t0)) s"
    [ $round -ge 6 ] || continue
    if [ -n "$MINUTES" ]; then
        [ $((SECONDS - t0)) -lt $((MINUTES * 60)) ] || break
    else
        [ "$done_packets" -lt "$PACKETS" ] || break
    fi
done

step "The books"
sum_of() { # JQ PATH: over all nodes
    jq -s "map($1) | add" "$LAB"/stats.?
}
snapshot() { for n in "${NODES[@]}"; do ctl "$n" stats --json >"$LAB/stats.$n" || return 1; done; }
# at rest: until nothing moves any more
last='' now=0 settled=''
for _ in 1 2 3 4 5 6 7 8 9 10; do
    sleep 1
    snapshot || die "meshctl stats failed"
    now=$(sum_of '.outbound.in + .inbound.in')
    [ "$now" != "$last" ] || { settled=1 && break; }
    last=$now
done
[ -n "$settled" ] || die "traffic does not end"

bad=0
unaccounted=0
for n in "${NODES[@]}"; do
    for way in outbound inbound; do
        # shellcheck disable=SC2016
        read -r entered originated out dropped consumed < <(jq -r ".$way | [.in, .originated, .out, .dropped, .consumed] | @tsv" "$LAB/stats.$n")
        open=$((entered + originated - out - dropped - consumed))
        unaccounted=$((unaccounted + ${open#-}))
        text="node $n $way: $entered in + $originated made = $out out + $dropped dropped + $consumed kept; $open open"
        if [ $open = 0 ]; then good "$text"; else bad=1; say "   ${RED}FAILED$PLAIN  $text"; fi
    done
    note "drops of $n: $(jq -c '.drops | with_entries(select(.value > 0))' "$LAB/stats.$n")"
done
sent=$(($(sum_of .udp.tx_packets) + round * JUNK)) received=$(sum_of .udp.rx_packets) overflow=$(sum_of .drops.udp_queue_overflow)
link_drops() { # what the underlay's devices dropped
    {
        for n in "${NODES[@]}"; do ip -n "$RUN-$n" -s -j link show ul0; done
        ip -n "$RUN-sw" -s -j link show type veth
    } | jq -s 'flatten | map(.stats64.rx.dropped + .stats64.tx.dropped) | add'
}
links=$(link_drops)
lost=$((sent - received)) kernel=$((overflow + links))
# A super-packet that the kernel drops counts once there, and as up to 64 datagrams here.
if [ $lost -ge $kernel ] && [ $lost -le $((kernel * 64)) ]; then
    good "all nodes: $sent sent = $received received + $lost lost; the kernel dropped $kernel ($overflow full socket, $links links)"
else
    bad=1
    say "   ${RED}FAILED$PLAIN  all nodes: $sent sent, $received received, but the kernel dropped $kernel ($overflow full socket, $links links)"
fi
for n in "${NODES[@]}"; do
    f=$(fds "$n") r=$(rss "$n")
    if [ "$f" -le "${FDS0[$n]}" ] && [ "$r" -le $((RSS0[$n] + RSS0[$n] / 10 + 2048)) ]; then
        good "node $n: $f descriptors (was ${FDS0[$n]}), $r KiB (was ${RSS0[$n]})"
    else
        bad=1
        say "   ${RED}FAILED$PLAIN  node $n: $f descriptors (was ${FDS0[$n]}), $r KiB (was ${RSS0[$n]})"
    fi
done
say
[ $bad = 0 ] || die "the books do not balance: $unaccounted packets unaccounted for"
say "${GREEN}$done_packets packets, 0 unaccounted for$PLAIN, in $((SECONDS - t0)) s"
