# shellcheck shell=bash
# Sourced by the scripts beside it: messages, installing what is missing, and a
# laboratory of network namespaces that takes itself down again.
#
#        node a                 switch                 node b
#   +--------------+        +------------+        +--------------+
#   | ul0 10.9.0.1 +--------+    br0     +--------+ 10.9.0.2 ul0 |   one L2, fd09::N as well;
#   | mesh0        |        +------------+        |        mesh0 |   or a single veth pair
#   |  10.42.1.1   |                              |   10.42.2.1  |   between two nodes
#   +--+-----------+                              +-----------+--+
#      | pod1 / cni0                              pod1 / cni0 |
#   +--+-----------+                              +-----------+--+
#   |  10.42.1.2   |                              |   10.42.2.2  |   pods: a veth and forwarding,
#   |  eth0        |                              |       eth0   |   or a bridge in the node
#   +--------------+                              +--------------+
#
# Node number N has underlay 10.9.0.N and fd09::N, subnets 10.42.N.0/24 and
# fd42:0:0:N::/64, VTEP MAC 0a:58:0a:09:00:N. Namespaces are called meshd-PID-NAME,
# where PID is the script's. No packet leaves them.

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$SCRIPTS")
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
MESHD=${MESHD:-$TARGET/release/meshd}
MESHCTL=${MESHCTL:-$TARGET/release/meshctl}
unset "${!MESHD_@}"    # meshd reads its keys from there too: none of the caller's here
RUN=meshd-$$           # prefix of every namespace
LAB=                   # scratch directory, made by lab_begin
UL_MTU=1500
NSS=()                 # namespaces that are ours
PIDS=()                # PID:START-TIME of processes that are ours
declare -A NODE=()     # name -> number
declare -A GIVEN=()    # NODE.4, NODE.6, NODE.mac -> what the servers gave it
declare -A DAEMON=()

# ---------------------------------------------------------------- messages

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' GREEN=$'\e[32m' RED=$'\e[31m' YELLOW=$'\e[33m' PLAIN=$'\e[0m' CLEAR=$'\r\e[K'
else
    BOLD='' DIM='' GREEN='' RED='' YELLOW='' PLAIN='' CLEAR=''
fi

say() { printf '%s\n' "$*"; }
note() { printf '   %s%s%s\n' "$DIM" "$*" "$PLAIN"; }
good() { printf '   %sok%s  %s\n' "$GREEN" "$PLAIN" "$*"; }
warn() { printf '%swarning:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }
die() {
    printf '%serror:%s %s\n' "$RED" "$PLAIN" "$*" >&2
    exit 1
}
step() { # TEXT: a numbered heading
    STEP=$((${STEP:-0} + 1))
    printf '\n%s%d. %s%s\n' "$BOLD" "$STEP" "$*" "$PLAIN"
}

busy() { # TEXT CMD…: runs CMD quietly with a progress line; its log is shown if it fails
    local text=$1 log rc t0=$SECONDS
    shift
    log=$(mktemp "${LAB:-${TMPDIR:-/tmp}}/meshd-log-XXXXXX") || return 1
    [ -n "$CLEAR" ] || printf '   ..  %s\n' "$text"
    background "$@" >"$log" 2>&1
    local pid=$LAST
    while [ -n "$CLEAR" ] && kill -0 "$pid" 2>/dev/null; do
        printf '%s   ..  %s %ss' "$CLEAR" "$text" $((SECONDS - t0))
        sleep 0.2
    done
    wait "$pid"
    rc=$?
    forget "$pid"
    printf '%s' "$CLEAR"
    if [ $rc = 0 ]; then
        good "$text ($((SECONDS - t0)) s)"
    else
        printf '   %sFAILED%s  %s\n' "$RED" "$PLAIN" "$text" >&2
        tail -n 60 "$log" >&2
    fi
    rm -f "$log"
    return $rc
}

# ------------------------------------------------------ what must be there

need_root() {
    [ "$(id -u)" = 0 ] || die "this makes network namespaces and needs root: sudo $0 $*"
}

missing_packages() { # CMD:PKG[,PKG]…: prints the packages of those commands that are absent
    local spec
    for spec; do
        command -v "${spec%%:*}" >/dev/null || printf '%s\n' "${spec#*:}" | tr ',' '\n'
    done | sort -u
}

apt_install() { # PKG…
    # shellcheck disable=SC2016
    busy "installing $*" env DEBIAN_FRONTEND=noninteractive sh -c '
        apt() { timeout -k 5 900 apt-get -qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20 "$@"; }
        [ -n "$1" ] || apt update || exit 1
        shift
        apt -y --no-install-recommends install "$@"' sh "${APT_UPDATED:-}" "$@" || return 1
    APT_UPDATED=1
    hash -r
}

want() { # CMD:PKG[,PKG]…: installs what is missing; 1 if that cannot be done, with advice
    local pkgs
    mapfile -t pkgs < <(missing_packages "$@")
    [ ${#pkgs[@]} -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt_install "${pkgs[@]}"
        mapfile -t pkgs < <(missing_packages "$@")
        [ ${#pkgs[@]} -gt 0 ] || return 0
    fi
    warn "missing, please install: ${pkgs[*]} (names of Debian packages)"
    return 1
}

need() { # as want, but the script cannot go on without
    want "$@" || die "cannot go on without these"
}

need_cargo() {
    need cc:gcc,libc6-dev
    if ! command -v cargo >/dev/null; then
        local home
        home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
        if [ -x "$home/.cargo/bin/cargo" ]; then
            PATH=$PATH:$home/.cargo/bin
            export CARGO_HOME=${CARGO_HOME:-$home/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
        else
            die "no cargo found: install Rust (https://rustup.rs), then run this again"
        fi
    fi
}

build() { # the release binaries, unless MESHD and MESHCTL point elsewhere
    [ "$MESHD" = "$TARGET/release/meshd" ] || return 0
    need_cargo
    local owner as=()
    owner=$(stat -c %U "$ROOT")
    if [ "$(id -u)" = 0 ] && [ "$owner" = "${SUDO_USER:-}" ] && [ "$owner" != root ]; then
        as=(runuser -u "$owner" -- env "HOME=$(getent passwd "$owner" | cut -d: -f6)" "PATH=$PATH")
    fi
    (cd "$ROOT" && busy "cargo build --release" "${as[@]}" cargo build --release --locked --bins) || die "the build failed"
}

build_loadgen() { # sets LOADGEN
    need cc:gcc,libc6-dev
    LOADGEN=$LAB/loadgen
    cc -O2 -Wall -Wextra -pthread -o "$LOADGEN" "$SCRIPTS/loadgen.c" || die "loadgen.c does not compile"
}

need_namespaces() { # a clear word before anything is half done
    ip netns add "$RUN-try" 2>"$LAB/err" && ip netns del "$RUN-try" && return 0
    die "cannot make network namespaces here: $(cat "$LAB/err") (a container needs --privileged, or run on the host)"
}

need_tun() {
    [ -c /dev/net/tun ] || modprobe tun 2>/dev/null
    [ -c /dev/net/tun ] || die "/dev/net/tun is missing: modprobe tun, or give the container --device /dev/net/tun"
}

have_kernel_vxlan() { # in a namespace of its own
    local rc
    ns_add vxtry || return 1
    ip -n "$RUN-vxtry" link add vx type vxlan id 1 dstport 8472 2>/dev/null
    rc=$?
    ns_del vxtry
    return $rc
}

# ---------------------------------------------- processes and taking down

background() { # CMD…: in a process group of its own, so that all it starts ends with it; LAST is its pid
    set -m
    "$@" </dev/null &
    LAST=$!
    set +m
    remember "$LAST"
}

start_time() { # PID
    local s
    s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    s=${s##*) }
    # shellcheck disable=SC2086
    set -- $s
    printf '%s' "${20}"
}
remember() { PIDS+=("$1:$(start_time "$1")"); }
forget() { # PID
    local p rest=()
    for p in "${PIDS[@]}"; do [ "${p%%:*}" = "$1" ] || rest+=("$p"); done
    PIDS=("${rest[@]}")
}
running() { # PID:START: is it still that very process
    [ "${1#*:}" != '' ] && [ "$(start_time "${1%%:*}")" = "${1#*:}" ] && [ "$(proc_state "${1%%:*}")" != Z ]
}
proc_state() { # PID
    local s
    s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    s=${s##*) }
    printf '%s' "${s%% *}"
}

signal() { # SIGNAL PID: the whole group where it leads one
    local s
    s=$(cat "/proc/$2/stat" 2>/dev/null) || return 0
    s=${s##*) }
    # shellcheck disable=SC2086
    if [ "$(set -- $s; echo "$3")" = "$2" ]; then kill "-$1" -- "-$2"; else kill "-$1" "$2"; fi 2>/dev/null
}

# shellcheck disable=SC2120
end_processes() { # [PID…]: these of ours, or all; TERM, and KILL after five seconds
    local p end=$((SECONDS + 5)) mine=()
    if [ $# = 0 ]; then # a signal may have come between start and remember
        for p in $(jobs -p); do [[ " ${PIDS[*]}" == *" $p:"* ]] || remember "$p"; done
    fi
    for p in "${PIDS[@]}"; do
        [ $# = 0 ] || [[ " $* " == *" ${p%%:*} "* ]] || continue
        mine+=("$p")
        running "$p" && signal TERM "${p%%:*}"
    done
    for p in "${mine[@]}"; do
        while running "$p" && [ $SECONDS -lt $end ]; do sleep 0.05; done
        running "$p" && signal KILL "${p%%:*}"
        wait "${p%%:*}" 2>/dev/null
        forget "${p%%:*}"
    done
}

take_down() { # processes and namespaces; the scratch directory stays
    local n
    # shellcheck disable=SC2119
    end_processes
    for n in "${!DAEMON[@]}"; do rm -f "$LAB/$n/meshd.sock"; done
    DAEMON=()
    for n in "${NSS[@]}"; do ip netns del "$n" 2>/dev/null; done
    NSS=()
    NODE=()
    GIVEN=()
}

cleanup() {
    local rc=$?
    trap '' INT TERM HUP
    trap - EXIT
    [ -z "${KEEP:-}" ] || exit $rc
    take_down
    case $LAB in */meshd-lab-*) rm -rf "$LAB" ;; esac
    exit $rc
}

lab_begin() { # call once, before anything is made
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    LAB=$(mktemp -d "${TMPDIR:-/tmp}/meshd-lab-XXXXXX") || die "no scratch directory"
    chmod 755 "$LAB"
}

# --------------------------------------------------------- running things

on() { # NODE CMD…
    local n=$1
    shift
    ip netns exec "$RUN-$n" "$@"
}

spawn() { # NODE LOG CMD…: in the background until the end; LAST is its pid
    local n=$1 log=$2
    shift 2
    ip netns exec "$RUN-$n" "$@" >"$log" 2>&1 </dev/null &
    LAST=$!
    remember "$LAST"
}

load() { # SECS OUT CMD…: in the foreground, bounded, and Ctrl-C is heard at once
    local secs=$1 out=$2 rc
    shift 2
    timeout -k 2 "$secs" "$@" >"$out" 2>"$out.err" </dev/null &
    local pid=$!
    remember "$pid"
    wait "$pid"
    rc=$?
    forget "$pid"
    return $rc
}
load_on() { # NODE SECS OUT CMD…
    local n=$1 secs=$2 out=$3
    shift 3
    load "$secs" "$out" ip netns exec "$RUN-$n" "$@"
}

wait_for() { # SECS CMD…: until CMD succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

pings() { # NODE ADDRESS: one answer within a second
    on "$1" ping -n -c1 -W1 "$2" >/dev/null 2>&1
}

listening() { # NODE PORT
    on "$1" ss -Hltn "sport = :$2" | grep -q .
}

json_num() { # KEY: the first number of that name in the JSON on stdin
    grep -o "\"$1\":[[:space:]]*-\?[0-9.]*" | head -n1 | sed 's/.*:[[:space:]]*//'
}

# --------------------------------------------------------------- topology

ns_add() { # NAME: a namespace with lo up, forwarding, and no surprises from the host's defaults
    NSS+=("$RUN-$1")
    ip netns add "$RUN-$1" || return 1
    # Where the host's default is bbr, sockets begin with that, and go on with its pacing when iperf3 has made them cubic (-C is set
    # behind the connect): a timer for each super-packet. A namespace cannot choose cubic for itself, but reno.
    # shellcheck disable=SC2016
    ip netns exec "$RUN-$1" sh -c 'for kv; do
            f=/proc/sys/net/${kv%%=*}
            [ ! -w "$f" ] || echo "${kv#*=}" >"$f"
        done' sh \
        ipv4/ip_forward=1 ipv4/conf/all/rp_filter=0 ipv4/conf/default/rp_filter=0 \
        ipv4/conf/all/send_redirects=0 ipv4/conf/default/send_redirects=0 \
        'ipv4/ip_local_port_range=10240 65535' ipv4/tcp_congestion_control=reno \
        ipv6/conf/all/disable_ipv6=0 ipv6/conf/default/disable_ipv6=0 \
        ipv6/conf/all/accept_dad=0 ipv6/conf/default/accept_dad=0 \
        ipv6/conf/all/accept_ra=0 ipv6/conf/default/accept_ra=0 \
        ipv6/conf/all/forwarding=1 ipv6/conf/default/forwarding=1
    ip -n "$RUN-$1" link set lo up
}
ns_del() { # NAME
    local n rest=()
    ip netns del "$RUN-$1" 2>/dev/null
    for n in "${NSS[@]}"; do [ "$n" = "$RUN-$1" ] || rest+=("$n"); done
    NSS=("${rest[@]}")
}

have_v6() { [ -e /proc/net/if_inet6 ]; }

node_add() { # NAME NUMBER
    ns_add "$1" || return 1
    NODE[$1]=$2
}
underlay() { # NODE [4|6]
    if [ "${2:-4}" = 6 ]; then printf 'fd09::%x' "${NODE[$1]}"; else printf '10.9.0.%d' "${NODE[$1]}"; fi
}
subnet() { # NODE [4|6]: what the servers gave it, or what follows from its number
    [ -z "${GIVEN[$1.${2:-4}]:-}" ] || { printf '%s' "${GIVEN[$1.${2:-4}]}"; return; }
    if [ "${2:-4}" = 6 ]; then printf 'fd42:0:0:%x::/64' "${NODE[$1]}"; else printf '10.42.%d.0/24' "${NODE[$1]}"; fi
}
vtep_mac() { [ -n "${GIVEN[$1.mac]:-}" ] && printf '%s' "${GIVEN[$1.mac]}" || printf '0a:58:0a:09:00:%02x' "${NODE[$1]}"; }
host_address() { # NODE HOST [4|6]: address HOST of the node's subnet
    local given=${GIVEN[$1.${3:-4}]:-}
    case $given in
    *::/64) if [ "$2" = 0 ]; then printf '%s' "${given%/64}"; else printf '%s%x' "${given%/64}" "$2"; fi; return ;;
    *.0/24) printf '%s.%d' "${given%.0/24}" "$2"; return ;;
    esac
    if [ "${3:-4}" = 6 ]; then
        if [ "$2" = 0 ]; then printf 'fd42:0:0:%x::' "${NODE[$1]}"; else printf 'fd42:0:0:%x::%x' "${NODE[$1]}" "$2"; fi
    else
        printf '10.42.%d.%d' "${NODE[$1]}" "$2"
    fi
}
overlay() { host_address "$1" "${OVERLAY_HOST:-1}" "${2:-4}"; } # NODE [4|6]; OVERLAY_HOST=0 where .1 is a bridge's

address_underlay() { # NODE
    ip -n "$RUN-$1" addr add "$(underlay "$1")/24" dev ul0
    ! have_v6 || ip -n "$RUN-$1" addr add "$(underlay "$1" 6)/64" dev ul0 nodad
    ip -n "$RUN-$1" link set ul0 up
}

switch_add() { # the L2 that nodes are plugged into
    ns_add sw || return 1
    ip -n "$RUN-sw" link add br0 type bridge forward_delay 0 &&
        ip -n "$RUN-sw" link set br0 up
}
plug() { # NODE: ul0 to the switch
    ip -n "$RUN-$1" link add ul0 mtu "$UL_MTU" type veth peer name "p-$1" mtu "$UL_MTU" netns "$RUN-sw" || return 1
    ip -n "$RUN-sw" link set "p-$1" master br0 up && address_underlay "$1"
}
pair() { # NODE NODE: ul0 to ul0, nothing between
    ip -n "$RUN-$1" link add ul0 mtu "$UL_MTU" type veth peer name ul0 mtu "$UL_MTU" netns "$RUN-$2" || return 1
    address_underlay "$1" && address_underlay "$2"
}

# What the underlay's NIC can do:
#   a  everything (a NIC that segments tunnels): nothing is ever cut
#   b  TCP and UDP segmentation, none inside tunnels
#   c  nothing, and no GRO: each packet alone
#   d  a plain NIC: packets cross singly, software GSO and GRO
#   e  as d, and checksums are really computed
# veth does GRO only for a sender without TSO, hence "gro on" beside "tso off".
profile() { # a|b|c|d|e NODE…
    local p=$1 n
    local tunnel=(tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off) set
    shift
    case $p in
    a) return 0 ;;
    b) set=("${tunnel[@]}" gro on) ;;
    c) set=("${tunnel[@]}" tso off tx-udp-segmentation off gso off gro off) ;;
    d) set=("${tunnel[@]}" tso off tx-udp-segmentation off gso on gro on) ;;
    e) set=("${tunnel[@]}" tso off tx-udp-segmentation off gso on gro on tx off rx off) ;;
    *) die "no underlay profile '$p': a, b, c, d or e" ;;
    esac
    for n; do
        on "$n" ethtool -K ul0 "${set[@]}" >/dev/null || { warn "ethtool -K ul0 ${set[*]} failed"; return 1; }
    done
}

pod_add() { # NODE K [veth|bridge]: a pod "NODE.K" with host address K+1
    local n=$1 k=$2 kind=${3:-veth} p=$1.$2 a4 a6
    a4=$(host_address "$n" $((k + 1))) a6=$(host_address "$n" $((k + 1)) 6)
    ns_add "$p" || return 1
    ip -n "$RUN-$p" link add eth0 mtu "${POD_MTU:-$UL_MTU}" type veth peer name "pod$k" mtu "${POD_MTU:-$UL_MTU}" netns "$RUN-$n" || return 1
    if [ "$kind" = bridge ]; then
        if ! ip -n "$RUN-$n" link show cni0 >/dev/null 2>&1; then
            ip -n "$RUN-$n" link add cni0 mtu "${POD_MTU:-$UL_MTU}" type bridge forward_delay 0
            ip -n "$RUN-$n" addr add "$(host_address "$n" 1)/24" dev cni0
            ! have_v6 || ip -n "$RUN-$n" addr add "$(host_address "$n" 1 6)/64" dev cni0 nodad
            ip -n "$RUN-$n" link set cni0 up
        fi
        ip -n "$RUN-$n" link set "pod$k" master cni0 up
        ip -n "$RUN-$p" addr add "$a4/24" dev eth0
        ip -n "$RUN-$p" link set eth0 up
        ip -n "$RUN-$p" route add default via "$(host_address "$n" 1)"
        have_v6 || return 0
        ip -n "$RUN-$p" addr add "$a6/64" dev eth0 nodad
        ip -n "$RUN-$p" route add default via "$(host_address "$n" 1 6)"
    else
        ip -n "$RUN-$n" addr add 169.254.1.1/32 dev "pod$k"
        ip -n "$RUN-$n" link set "pod$k" up
        ip -n "$RUN-$n" route add "$a4/32" dev "pod$k"
        ip -n "$RUN-$p" addr add "$a4/32" dev eth0
        ip -n "$RUN-$p" link set eth0 up
        ip -n "$RUN-$p" route add 169.254.1.1 dev eth0
        ip -n "$RUN-$p" route add default via 169.254.1.1 dev eth0
        have_v6 || return 0
        ip -n "$RUN-$n" addr add fe80::1/64 dev "pod$k" nodad
        ip -n "$RUN-$n" route add "$a6/128" dev "pod$k"
        ip -n "$RUN-$p" addr add "$a6/128" dev eth0 nodad
        ip -n "$RUN-$p" route add default via fe80::1 dev eth0
    fi
}

overlay_mtu() { # OUTER(4|6)
    if [ "$1" = 6 ]; then echo $((UL_MTU - 70)); else echo $((UL_MTU - 50)); fi
}

# A kernel VXLAN device as flannel sets it up: VNI 1, port 8472, no learning,
# permanent neighbour and FDB entries for each peer, on-link routes to its subnets.
kernel_vxlan_node() { # NODE OUTER(4|6) PEER…
    local n=$1 outer=$2 p
    shift 2
    ip -n "$RUN-$n" link add vxlan0 address "$(vtep_mac "$n")" mtu "$(overlay_mtu "$outer")" type vxlan \
        id 1 dstport 8472 local "$(underlay "$n" "$outer")" dev ul0 nolearning || return 1
    ip -n "$RUN-$n" addr add "$(overlay "$n")/32" dev vxlan0
    ! have_v6 || ip -n "$RUN-$n" addr add "$(overlay "$n" 6)/128" dev vxlan0 nodad
    ip -n "$RUN-$n" link set vxlan0 up || return 1
    for p; do
        bridge -n "$RUN-$n" fdb add "$(vtep_mac "$p")" dev vxlan0 dst "$(underlay "$p" "$outer")" self permanent
        ip -n "$RUN-$n" neigh add "$(overlay "$p")" lladdr "$(vtep_mac "$p")" dev vxlan0 nud permanent
        ip -n "$RUN-$n" route add "$(subnet "$p")" via "$(overlay "$p")" dev vxlan0 onlink src "$(overlay "$n")" || return 1
        have_v6 || continue
        ip -n "$RUN-$n" neigh add "$(overlay "$p" 6)" lladdr "$(vtep_mac "$p")" dev vxlan0 nud permanent
        ip -n "$RUN-$n" route add "$(subnet "$p" 6)" via "$(overlay "$p" 6)" dev vxlan0 onlink src "$(overlay "$n" 6)" || return 1
    done
}

# ------------------------------------------------------------------ meshd

write_nodes() { # OUTER(4|6) NODE…: the node list of all meshd nodes, replaced in one go
    local outer=$1 n subs
    shift
    {
        echo "nodes:"
        for n; do
            subs=$(subnet "$n")
            ! have_v6 || subs="$subs, \"$(subnet "$n" 6)\""
            printf '  - name: %s\n    underlay: "%s"\n    subnets: [%s]\n    mac: "%s"\n' \
                "$n" "$(underlay "$n" "$outer")" "$subs" "$(vtep_mac "$n")"
            [ ! -r "$LAB/$n/public-keys" ] || awk 'NR == 1 { print "    public-key: " $1 } NR > 1 { lanes = lanes sep $1; sep = ", " } END { print "    lane-keys: [" lanes "]" }' "$LAB/$n/public-keys"
        done
    } >"$LAB/nodes.yaml.new" && mv "$LAB/nodes.yaml.new" "$LAB/nodes.yaml"
}

make_keys() { # NODE…: a key for each, one lane a core; node lists that are written afterwards name them
    local n
    for n; do
        mkdir -p "$LAB/$n/data"
        (umask 077 && "$MESHD" keygen --lanes "$(($(nproc) < 16 ? $(nproc) : 16))" >"$LAB/$n/data/node.key" 2>"$LAB/$n/public-keys")
    done
}
forget_keys() { # NODE…
    local n
    for n; do rm -f "$LAB/$n/public-keys" "$LAB/$n/data/node.key"; done
}

start_meshd() { # NODE OUTER(4|6) [CONFIG LINE…]; set PIN_CPU to pin it, NODE_IP to name an interface
    local n=$1 outer=$2 pin=() line
    shift 2
    mkdir -p "$LAB/$n"
    {
        printf 'node-name: %s\nnode-ip: "%s"\nnodes-file: %s\ndata-dir: %s\nsocket: %s\n' \
            "$n" "${NODE_IP:-$(underlay "$n" "$outer")}" "$LAB/nodes.yaml" "$LAB/$n/data" "$LAB/$n/meshd.sock"
        [ "${OVERLAY_HOST:-1}" = 1 ] || echo "address: network"
        for line; do [ -z "$line" ] || printf '%s\n' "$line"; done
    } >"$LAB/$n/config.yaml"
    [ -z "${PIN_CPU:-}" ] || pin=(taskset -c "$PIN_CPU")
    spawn "$n" "$LAB/$n/meshd.log" "${pin[@]}" "$MESHD" run --config "$LAB/$n/config.yaml"
    DAEMON[$n]=$LAST
}

start_member() { # NODE server|agent [CONFIG LINE…]: MESHD_TOKEN is what it joins with
    local n=$1 verb=$2 line
    shift 2
    mkdir -p "$LAB/$n"
    {
        printf 'node-name: %s\nnode-ip: "%s"\ndata-dir: %s\nsocket: %s\n' \
            "$n" "$(underlay "$n")" "$LAB/$n/data" "$LAB/$n/meshd.sock"
        for line; do [ -z "$line" ] || printf '%s\n' "$line"; done
    } >"$LAB/$n/config.yaml"
    spawn "$n" "$LAB/$n/meshd.log" "$MESHD" "$verb" --config "$LAB/$n/config.yaml"
    DAEMON[$n]=$LAST
}

learn() { # ASKED NODE…: subnets and MACs as ASKED's node list has them
    local asked=$1 n entry
    shift
    for n; do
        entry=$(ctl "$asked" nodes --json | sed 's/},{/}\n{/g' | grep "\"name\":\"$n\"") || return 1
        GIVEN[$n.4]=$(grep -o '"[0-9.]*/24"' <<<"$entry" | tr -d '"' | tail -n1)
        GIVEN[$n.6]=$(grep -o '"[0-9a-f:]*/64"' <<<"$entry" | tr -d '"' | tail -n1)
        [ ! -S "$LAB/$n/meshd.sock" ] || GIVEN[$n.mac]=$(ctl "$n" status --json | grep -o '"vtep_mac":"[^"]*"' | cut -d'"' -f4)
    done
}

ctl() { # NODE ARGS…: meshctl of that node
    local n=$1
    shift
    "$MESHCTL" --socket "$LAB/$n/meshd.sock" "$@"
}

listens_or_ended() { [ -S "$LAB/$1/meshd.sock" ] || ! kill -0 "${DAEMON[$1]}" 2>/dev/null; }

meshd_ready() { # NODE…: waits for each; shows the log of one that does not come up
    local n
    for n; do
        wait_for 10 listens_or_ended "$n"
        if ! load 20 "$LAB/$n/status" "$MESHCTL" --socket "$LAB/$n/meshd.sock" status --wait 15s; then
            printf '%smeshd on node %s did not come up.%s Its status and log:\n' "$RED" "$n" "$PLAIN" >&2
            cat "$LAB/$n/status" "$LAB/$n/status.err" 2>/dev/null >&2
            tail -n 30 "$LAB/$n/meshd.log" >&2
            return 1
        fi
    done
}
