#!/usr/bin/env bash
# shake.sh [N [FAULT…]]: harms a node in each of these ways N times (20 unless said) and
# prints how long it takes until all that is meshd's on the host is right again and a
# ping is answered: median and worst.
#
#   addresses  routes  mtu    flushed or changed on mesh0
#   down  deleted  renamed  moved    mesh0 itself; moved: into another namespace
#   underlay-mtu  underlay-flap  underlay-address    ul0; the address is told to both nodes' lists at once
#   stopped    SIGSTOP, and SIGCONT a third of a second later
#
#      node a                node b
#  +-------------+       +-------------+
#  | meshd mesh0 |       | meshd mesh0 |
#  | ul0         |       | ul0         |
#  +------+------+       +------+------+
#         |                     |
#  =======+=====================+=======  br0
#
# Each box is a network namespace, removed in the end. Exit code 0 only if nothing takes
# longer than two seconds (the underlay's address: five).
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ALL=(addresses routes mtu down deleted renamed moved underlay-mtu underlay-flap stopped underlay-address)
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
*[!0-9]* | 0) echo "usage: shake.sh [N [FAULT…]]" >&2; exit 2 ;;
esac
need_root "$@"
N=${1:-20}
[ $# = 0 ] || shift
for f; do [[ " ${ALL[*]} " == *" $f "* ]] || { echo "shake.sh: no fault '$f'; there are: ${ALL[*]}" >&2; exit 2; }; done
[ $# -gt 0 ] || set -- "${ALL[@]}"

lab_begin
need ip:iproute2 ping:iputils-ping
need_namespaces
need_tun
build
switch_add || die "no bridge"
i=0
for n in a b; do
    i=$((i + 1))
    { node_add $n $i && plug $n; } || die "no namespace for node $n"
done
write_nodes 4 a b
NODE_IP=ul0 start_meshd a 4
start_meshd b 4
meshd_ready a b || die "the mesh did not come up"

ours() { # all that is meshd's on node a
    # shellcheck disable=SC2016
    on a sh -c '
        ip -o link show dev mesh0 | sed "s/^[0-9]*: //; s/ state [A-Z]*//; s/qlen.*//"
        ip -o addr show dev mesh0 | sed "s/^[0-9]*: //; s/ valid_lft.*//"
        ip route show table all proto 72; ip -6 route show table all proto 72' 2>/dev/null
}
answered() { on a ping -n -q -c1 -W 0.1 "$(overlay b)" >/dev/null 2>&1; }
RIGHT=$(ours)
AT=1 # the last number of a's underlay address

harm() { # FAULT: what is right afterwards is in WANTED
    WANTED=$RIGHT
    case $1 in
    addresses) on a ip addr flush dev mesh0 ;;
    routes) on a sh -c 'ip route flush proto 72; ip -6 route flush proto 72' ;;
    mtu) on a ip link set mesh0 mtu 1300 ;;
    down) on a ip link set mesh0 down ;;
    deleted) on a ip link del mesh0 ;;
    renamed) on a sh -c 'ip link set mesh0 down; ip link set mesh0 name other0' ;;
    moved) on a ip link set mesh0 netns "$RUN-sw" ;;
    underlay-mtu) on a ip link set ul0 mtu 1400 && WANTED=${RIGHT//mtu 1450/mtu 1350} ;;
    underlay-flap) on a sh -c 'ip link set ul0 down; sleep 0.1; ip link set ul0 up' ;;
    stopped)
        kill -STOP "${DAEMON[a]}"
        sleep 0.3
        answered && die "positive control: a meshd that is stopped carries nothing"
        kill -CONT "${DAEMON[a]}"
        ;;
    underlay-address)
        local old=10.9.0.$AT
        AT=$((92 - AT))
        sed "s/\"$old\"/\"10.9.0.$AT\"/" "$LAB/nodes.yaml" >"$LAB/nodes.yaml.new"
        on a sh -c "ip addr del $old/24 dev ul0; ip addr add 10.9.0.$AT/24 dev ul0"
        mv "$LAB/nodes.yaml.new" "$LAB/nodes.yaml"
        ;;
    esac
}
mend() { # FAULT: what is not meshd's to put right
    case $1 in
    renamed) on a ip link del other0 ;;
    moved) on sw ip link del mesh0 ;;
    underlay-mtu)
        on a ip link set ul0 mtu 1500
        wait_for 10 right "$RIGHT" || return 1
        ;;
    underlay-flap) on a ip addr add "$(underlay a 6)/64" dev ul0 nodad 2>/dev/null ;;
    esac
    return 0
}
right() { [ "$(ours)" = "$1" ]; }

ms() { # microseconds since the epoch, whatever the locale's decimal point
    local t=${EPOCHREALTIME//[!0-9]/}
    echo $((t / 1000))
}

step "Faults, $N times each"
printf '   %-18s %10s %10s\n' fault "median ms" "worst ms"
bad=0
for fault; do
    : >"$LAB/times"
    for ((k = 0; k < N; k++)); do
        sleep 0.0$((RANDOM % 90 + 10)) # not always at the same place of meshd's own beat
        sleep 0.$((RANDOM % 900 + 100))
        harm "$fault" || die "cannot do '$fault'"
        t0=$(ms)
        until { right "$WANTED" && answered; }; do
            [ $(($(ms) - t0)) -lt 20000 ] || die "'$fault' is not put right in 20 seconds; $(ctl a status)"
        done
        echo $(($(ms) - t0)) >>"$LAB/times"
        mend "$fault" || die "'$fault' cannot be undone"
        wait_for 10 ctl a status || die "after '$fault': $(ctl a status)"
    done
    median=$(sort -n "$LAB/times" | awk '{v[NR]=$1} END {print v[int((NR + 1) / 2)]}')
    worst=$(sort -n "$LAB/times" | tail -n1)
    limit=2000
    [ "$fault" != underlay-address ] || limit=5000
    word=
    [ "$worst" -le $limit ] || { bad=1 word="  ${RED}more than $limit$PLAIN"; }
    printf '   %-18s %10d %10d%s\n' "$fault" "$median" "$worst" "$word"
done
say
[ $bad = 0 ] || die "something took too long"
say "${GREEN}all is put right in time$PLAIN"
