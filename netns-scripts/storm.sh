#!/usr/bin/env bash
# storm.sh [ROUNDS]: what one peer that cannot be reached costs the others. A TCP stream
# runs from a to b while 20,000 datagrams a second are sent from a towards c, which
#
#   none       are not sent at all, for comparison
#   vanish     leave a and are lost on the way: what the others are compared with
#   silent     has no neighbour entry: nobody answers ARP
#   blackhole  has a blackhole route (EINVAL)
#   prohibit   has a prohibit route (EACCES)
#   firewall   is dropped by a's own firewall (EPERM)
#   slow       leaves through a queue that empties at 1 Mbit/s, so that a's sockets fill up (EAGAIN)
#
#      node a                node b
#  +-------------+       +-------------+
#  | meshd mesh0 |       | meshd mesh0 |
#  | ul1     ul0 |       | ul0         |
#  +--+-------+--+       +------+------+
#     |       |                 |
#     o  =====+=================+=====  br0          c would be behind ul1
#
# Interleaved rounds (5 unless said) of two seconds each; medians. All of it happens in
# namespaces of its own, removed in the end. Exit code 0 only if each costs the stream at
# most 5 % (slow: reported alone), meshd lives, and each datagram is counted.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
*[!0-9]* | 0) echo "usage: storm.sh [ROUNDS]" >&2; exit 2 ;;
esac
need_root "$@"
ROUNDS=${1:-5}
SECS=${SECS:-2}
PPS=${PPS:-20000}
# shellcheck disable=SC2206
KINDS=(${KINDS:-vanish none silent blackhole prohibit firewall slow})

lab_begin
need ip:iproute2 tc:iproute2 nft:nftables iperf3:iperf3 jq:jq
need_namespaces
need_tun
build
build_loadgen
switch_add || die "no bridge"
for n in a b; do
    [ $n = a ] && number=1 || number=2
    { node_add $n "$number" && plug $n; } || die "no namespace for node $n"
done
node_add c 3 || die "no namespace for c"
write_nodes 4 a b c
for n in a b; do start_meshd $n 4; done
meshd_ready a b || die "the mesh did not come up"
# where c would be: a port that swallows
{ ip -n "$RUN-a" link add ul1 type veth peer name hole netns "$RUN-sw" &&
    ip -n "$RUN-a" link set ul1 up && ip -n "$RUN-sw" link set hole up; } || die "no second link"
spawn b /dev/null iperf3 -s
wait_for 5 listening b 5201 || die "iperf3 does not listen"

harm() { # KIND
    local ip
    ip=$(underlay c)
    case $1 in
    none) return 0 ;;
    blackhole | prohibit) ip -n "$RUN-a" route add "$1" "$ip/32" && return ;;
    esac
    ip -n "$RUN-a" route add "$ip/32" dev ul1 || return 1
    [ "$1" = silent ] || ip -n "$RUN-a" neigh replace "$ip" lladdr 0a:00:00:00:00:0c dev ul1 nud permanent
    case $1 in
    firewall)
        on a nft "add table inet storm; add chain inet storm out { type filter hook output priority 0; }; add rule inet storm out ip daddr $ip drop"
        ;;
    slow) on a tc qdisc add dev ul1 root tbf rate 1mbit burst 10kb limit 1gb ;;
    esac
}
mend() { # KIND
    case $1 in
    firewall) on a nft delete table inet storm ;;
    slow) on a tc qdisc del dev ul1 root ;;
    esac
    ip -n "$RUN-a" route del "$(underlay c)/32" 2>/dev/null
    ip -n "$RUN-a" neigh del "$(underlay c)" dev ul1 2>/dev/null
    return 0
}

cpu_ticks() { # of meshd on a
    local s
    s=$(cat "/proc/${DAEMON[a]}/stat") || return 1
    s=${s##*) }
    # shellcheck disable=SC2086
    set -- $s
    echo $((${12} + ${13}))
}

dropped() { ctl a stats --json | jq '.drops | .udp_send_failed + .udp_buffer_full'; }

one() { # KIND: Mbit/s, CPU and drops of one round
    local kind=$1 storm t0 t1 d0 d1 pps=$PPS
    [ "$kind" != none ] || pps=1
    d0=$(dropped)
    harm "$kind" || die "cannot set up '$kind'"
    "$LOADGEN" udp "from=$RUN-a" "to=$RUN-c" "dst=$(overlay c)" size=1400 secs=$((SECS + 1)) "pps=$pps" flows=4 >"$LAB/storm" 2>&1 &
    storm=$!
    remember $storm
    sleep 0.5
    t0=$(cpu_ticks)
    load_on a $((SECS + 10)) "$LAB/iperf" iperf3 -c "$(overlay b)" -t "$SECS" -C cubic -J || die "iperf3 failed: $(cat "$LAB/iperf.err")"
    t1=$(cpu_ticks) || die "meshd has ended: $(tail -n 5 "$LAB/a/meshd.log")"
    wait $storm
    forget $storm
    d1=$(dropped)
    mend "$kind"
    printf '%s %s %s\n' "$(jq '.end.sum_received.bits_per_second / 1e6 | floor' "$LAB/iperf")" "$(((t1 - t0) * 100 / (SECS * 100)))" $((d1 - d0)) >>"$LAB/$kind.figures"
}

# so that the load generator can listen where nobody is heard
ip -n "$RUN-c" addr add "$(overlay c)/32" dev lo
step "Storms"
before=$(ctl a stats --json | jq '.outbound | .in + .originated - .out - .dropped - .consumed')
for ((r = 1; r <= ROUNDS; r++)); do
    for kind in "${KINDS[@]}"; do one "$kind"; done
    note "round $r of $ROUNDS"
done

median() { # COLUMN KIND
    awk -v c="$1" '{print $c}' "$LAB/$2.figures" | sort -n | awk '{v[NR]=$1} END {print v[int((NR + 1) / 2)]}'
}
base=$(median 1 vanish)
bad=0
printf '\n   %-10s %12s %14s %8s %10s\n' storm "Mbit/s a-b" "of 'vanish'" "CPU %" drops
for kind in "${KINDS[@]}"; do
    rate=$(median 1 "$kind")
    share=$((rate * 1000 / base))
    word=
    if [ $share -lt 950 ]; then
        if [ "$kind" = slow ]; then word="  (shared sockets)"; else
            bad=1
            word="  ${RED}more than 5 % lost$PLAIN"
        fi
    fi
    printf '   %-10s %12d %13d.%d%% %7d %10d%s\n' "$kind" "$rate" $((share / 10)) $((share % 10)) "$(median 2 "$kind")" "$(median 3 "$kind")" "$word"
done
say
after=$(ctl a stats --json | jq '.outbound | .in + .originated - .out - .dropped - .consumed')
[ "$before$after" = 00 ] || die "not each packet is counted: $before, $after"
note "drops of a: $(ctl a stats --json | jq -c '.drops | with_entries(select(.value > 0))')"
[ $bad = 0 ] || die "a peer that cannot be reached costs the others too much"
say "${GREEN}no peer costs the others more than 5 %$PLAIN"
