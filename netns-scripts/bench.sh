#!/usr/bin/env bash
# bench.sh: meshd against the kernel's VXLAN device and the bare underlay, with
# real traffic, in namespaces of its own. Contenders take turns inside each round,
# so that a machine that changes its mood does so for all of them.
#
#     pod a.1        node a                       node b        pod b.1
#   +---------+   +------------+              +------------+   +---------+
#   |  eth0   +---+ pod1   ul0 +--------------+ ul0   pod1 +---+  eth0   |
#   | .1.2    |   | .1.1 OVERLAY      veth      OVERLAY .2.1|   |   .2.2  |
#   +---------+   +------------+   profile    +------------+   +---------+
#        from=pods    from=nodes   a b c d e      OVERLAY: mesh0, vxlan0, or nothing (raw)
#
# from=bridged is from=pods with a bridge cni0 in each node instead of a bare veth.
# Results: a table of medians (min-max) with the ratio to kvxlan, taken per round;
# each sample as one JSON line with --json.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'USAGE'
usage: bench.sh [options]                                            (root)
  --rounds N            interleaved rounds                     5
  --secs S              length of one measurement              3
  --tests LIST          tcp,udp,rtt,crr or all                 tcp
  --profiles LIST       underlay: a,b,c,d,e (see lib.sh)       a,b,c,d,e
  --from LIST           nodes,pods,bridged                     nodes,pods
  --contenders LIST     raw,kvxlan,meshd,meshd-wg,wggo, or     raw,kvxlan,meshd
                        plug-ins; meshd-wg is encrypted, wggo is
                        wireguard-go, WIREGUARD_GO names another
  --inner LIST          overlay address family: 4,6            4
  --outer LIST          underlay address family: 4,6           4
  --flows LIST          UDP flows                              1,64
  --pin                 all of node a on CPU 0, of node b on CPU 1
  --busy                meanwhile a program computes on each CPU (s/GB is left out)
  --meshd-extra LINE    a line for meshd's config, such as "io: mmsg"; may be repeated
  --contender-dir DIR   plug-ins: NAME.sh there defines up() (see plug_in below)
  --json FILE           each sample as one JSON line
  --markdown            the table as Markdown
  --quick               one round, one second, profile a, from nodes
Environment: MESHD and MESHCTL name other binaries than target/release's.
USAGE
}

ROUNDS=5 SECS=3 TESTS=tcp PROFILES=a,b,c,d,e FROM=nodes,pods CONTENDERS=raw,kvxlan,meshd
INNER=4 OUTER=4 FLOWS=1,64 PIN='' BUSY='' JSON='' MARKDOWN='' CONTENDER_DIR='' EXTRA=()
[ -n "$*" ] && ASKED=$* || ASKED=''
while [ $# -gt 0 ]; do
    case $1 in
    --pin) PIN=1; shift; continue ;;
    --busy) BUSY=1; shift; continue ;;
    --markdown) MARKDOWN=1; shift; continue ;;
    --quick) ROUNDS=1 SECS=1 PROFILES=a FROM=nodes; shift; continue ;;
    -h | --help) usage; exit 0 ;;
    esac
    [ $# -ge 2 ] || { usage >&2; exit 2; }
    case $1 in
    --rounds) ROUNDS=$2 ;;
    --secs) SECS=$2 ;;
    --tests) TESTS=${2/all/tcp,udp,rtt,crr} ;;
    --profiles) PROFILES=$2 ;;
    --from) FROM=$2 ;;
    --contenders) CONTENDERS=$2 ;;
    --inner) INNER=$2 ;;
    --outer) OUTER=$2 ;;
    --flows) FLOWS=$2 ;;
    --meshd-extra) EXTRA+=("$2") ;;
    --contender-dir) CONTENDER_DIR=$2 ;;
    --json) JSON=$2 ;;
    *) echo "bench.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift 2
done

bad() { echo "bench.sh: $*" >&2; exit 2; }
each_of() { # OPTION LIST ALLOWED…: refuses what is not allowed
    local what=$1 list=$2 item
    shift 2
    [ -n "$list" ] || bad "$what needs a list of: $*"
    for item in ${list//,/ }; do [[ " $* " == *" $item "* ]] || bad "$what: '$item' is none of: $*"; done
}
each_of --tests "$TESTS" tcp udp rtt crr
each_of --profiles "$PROFILES" a b c d e
each_of --from "$FROM" nodes pods bridged
each_of --inner "$INNER" 4 6
each_of --outer "$OUTER" 4 6
[[ $ROUNDS =~ ^[1-9][0-9]*$ && $SECS =~ ^[1-9][0-9]*$ ]] || bad "--rounds and --secs are whole numbers from 1"
for f in ${FLOWS//,/ }; do [[ $f =~ ^[1-9][0-9]*$ && $f -le 256 ]] || bad "--flows: 1 to 256"; done
for c in ${CONTENDERS//,/ }; do
    case $c in raw | kvxlan | meshd | meshd-wg | wggo) ;; *) [ -r "$CONTENDER_DIR/$c.sh" ] || bad "--contenders: '$c' is none of raw, kvxlan, meshd, meshd-wg, wggo, and no $c.sh in --contender-dir" ;; esac
done

need_root "$ASKED"
lab_begin
need ip:iproute2 ss:iproute2 ping:iputils-ping ethtool:ethtool iperf3:iperf3 jq:jq taskset:util-linux awk:mawk
need_namespaces
build_loadgen
if [[ ,$CONTENDERS, == *,meshd,* || ,$CONTENDERS, == *,meshd-wg,* ]]; then
    need_tun
    build
fi
WIREGUARD_GO=${WIREGUARD_GO:-wireguard-go}
[[ ,$CONTENDERS, != *,wggo,* ]] || need wg:wireguard-tools "$WIREGUARD_GO":wireguard-go
[[ ,$CONTENDERS, != *,kvxlan,* ]] || have_kernel_vxlan || die "this kernel has no VXLAN device (modprobe vxlan?): leave kvxlan out of --contenders"
[[ ,$INNER,$OUTER, != *,6,* ]] || have_v6 || die "this kernel has no IPv6"
SAMPLES=$LAB/samples.tsv
: >"$SAMPLES"
[ -z "$JSON" ] || : >"$JSON" || die "cannot write $JSON"
HZ=$(getconf CLK_TCK)
PIN_A=() PIN_B=() CPU=()
if [ -n "$PIN" ]; then
    [ "$(nproc)" -ge 2 ] || die "--pin needs two CPUs"
    PIN_A=(taskset -c 0) PIN_B=(taskset -c 1) CPU=("cpu=0,1")
fi

# ------------------------------------------------------------ contenders

up_raw() {
    local f
    for f in 4 6; do
        [ $f = 4 ] || have_v6 || continue
        ip -n "$RUN-a" route add "$(subnet b $f)" via "$(underlay b $f)"
        ip -n "$RUN-b" route add "$(subnet a $f)" via "$(underlay a $f)"
    done
    [ "$from" != nodes ] || DST=$(underlay b "$inner")
}
up_kvxlan() {
    kernel_vxlan_node a "$outer" b && kernel_vxlan_node b "$outer" a
}
up_meshd() {
    forget_keys a b
    write_nodes "$outer" a b
    PIN_CPU=${PIN:+0} start_meshd a "$outer" "${EXTRA[@]}"
    PIN_CPU=${PIN:+1} start_meshd b "$outer" "${EXTRA[@]}"
    meshd_ready a b
}

up_meshd-wg() {
    make_keys a b
    write_nodes "$outer" a b
    PIN_CPU=${PIN:+0} start_meshd a "$outer" "encryption: wireguard" "${EXTRA[@]}"
    PIN_CPU=${PIN:+1} start_meshd b "$outer" "encryption: wireguard" "${EXTRA[@]}"
    meshd_ready a b
}
up_wggo() {
    local n peer wg f pin at
    for n in a b; do
        wg=wg$n$((BASHPID % 100000)) && eval "WG_$n=$wg"
        mkdir -p "$LAB/$n"
        (umask 077 && wg genkey >"$LAB/$n/wg.key") && wg pubkey <"$LAB/$n/wg.key" >"$LAB/$n/wg.pub"
        pin=("${PIN_A[@]}")
        [ $n = a ] || pin=("${PIN_B[@]}")
        spawn "$n" "$LAB/$n/wggo.log" "${pin[@]}" env WG_PROCESS_FOREGROUND=1 LOG_LEVEL=error "$WIREGUARD_GO" -f "$wg"
        wait_for 5 on "$n" wg show "$wg" || return 1
    done
    for n in a b; do
        peer=$([ $n = a ] && echo b || echo a)
        eval "wg=\$WG_$n"
        at=$(underlay "$peer" "$outer")
        [ "$outer" = 4 ] || at="[$at]"
        on "$n" wg set "$wg" listen-port 51820 private-key "$LAB/$n/wg.key" peer "$(cat "$LAB/$peer/wg.pub")" \
            endpoint "$at:51820" allowed-ips "$(subnet "$peer"),$(subnet "$peer" 6)" || return 1
        ip -n "$RUN-$n" link set "$wg" mtu $((1500 - (outer == 6 ? 80 : 60))) up
        for f in 4 6; do
            ip -n "$RUN-$n" addr add "$(overlay $n $f)/$([ $f = 4 ] && echo 32 || echo 128)" dev "$wg"
            ip -n "$RUN-$n" route add "$(subnet "$peer" $f)" dev "$wg"
        done
    done
}

# A plug-in is sourced for each measurement and defines up(), after which OA can
# reach OB; down() if something outlives its processes. It finds NSA NSB (namespaces),
# UA UB (underlay), OA OB (overlay, may be changed), ULDEV, PROFILE, WORK (scratch), and
# daemon NS CMD…, inA CMD…, inB CMD…, wait_for SECS CMD….
plug_in() { # NAME
    NSA=$RUN-a NSB=$RUN-b ULDEV=ul0 WORK=$LAB/plug-in
    UA=$(underlay a "$outer") UB=$(underlay b "$outer") OA=10.244.1.1 OB=10.244.2.1 PROFILE=$p
    export NSA NSB ULDEV WORK UA UB OA OB PROFILE
    if [ "$from $inner" != "nodes 4" ]; then
        warn "plug-ins are measured from the nodes, over IPv4"
        return 1
    fi
    mkdir -p "$WORK"
    unset -f up
    down() { :; }
    # shellcheck disable=SC1090
    . "$CONTENDER_DIR/$1.sh" && up || return 1
    DST=$OB
}
down() { :; }
inA() { on a "${PIN_A[@]}" "$@"; }
inB() { on b "${PIN_B[@]}" "$@"; }
daemon() { # NS CMD…
    local node=${1#"$RUN"-} pin=("${PIN_A[@]}")
    shift
    [ "$node" = a ] || pin=("${PIN_B[@]}")
    spawn "$node" "$WORK/daemon-$node-$RANDOM.log" "${pin[@]}" "$@"
}

# ----------------------------------------------------------- measurements

failed() { # TEXT
    [ -z "$CLEAR" ] || printf "%s" "$CLEAR"
    warn "$contender, profile $p, $from: $*"
    FAILED=1
}

json_bool() { [ -n "$1" ] && echo true || echo false; }

sample() { # METRIC VALUE UNIT
    case $2 in
    "" | null) failed "no value for $1"; return ;;
    esac
    printf '%s\t' "$p" "$outer" "$inner" "$from" "$contender" "$round" "$1" "$3" >>"$SAMPLES"
    printf '%s\n' "$2" >>"$SAMPLES"
    [ -z "$JSON" ] || printf '{"round":%d,"contender":"%s","profile":"%s","outer":%d,"inner":%d,"from":"%s","pin":%s,"busy":%s,"metric":"%s","value":%s,"unit":"%s"}\n' \
        "$round" "$contender" "$p" "$outer" "$inner" "$from" "$(json_bool "$PIN")" "$(json_bool "$BUSY")" "$1" "$2" "$3" >>"$JSON"
    LINE+="  $1 $2"
}

busy_ticks() { awk '/^cpu /{print $2 + $3 + $4 + $7 + $8; exit}' /proc/stat; }

iperf_server() { # sets SERVER
    spawn "$DST_NS" "$LAB/iperf-server.log" "${PIN_B[@]}" timeout -k 2 $((SECS + 20)) iperf3 -s -1 -B "$DST"
    SERVER=$LAST
    wait_for 3 listening "$DST_NS" 5201
}

tcp() { # STREAMS
    local m=tcp$1 t0 t1 out=$LAB/iperf.json bytes
    iperf_server
    t0=$(busy_ticks)
    load_on "$SRC_NS" $((SECS + 10)) "$out" "${PIN_A[@]}" iperf3 -c "$DST" -C cubic -t "$SECS" -P "$1" -J
    t1=$(busy_ticks)
    end_processes "$SERVER"
    bytes=$(jq -r '.end.sum_received.bytes // 0' "$out" 2>/dev/null)
    if [ "${bytes:-0}" = 0 ]; then
        failed "iperf3: $(jq -r '.error // "no bytes arrived"' "$out" 2>/dev/null)"
        return
    fi
    sample "$m" "$(jq -r '.end.sum_received.bits_per_second / 1e7 | round / 100' "$out")" Gbit/s
    [ -n "$BUSY" ] || sample "${m}_cpu" "$(awk -v t=$((t1 - t0)) -v hz="$HZ" -v b="$bytes" 'BEGIN{printf "%.3f", t / hz / b * 1e9}')" s/GB
    sample "${m}_retransmits" "$(jq -r '.end.sum_sent.retransmits // 0' "$out")" segments
}

loadgen() { # SECS ARGS…: answer in $LAB/loadgen.json
    local limit=$1
    shift
    load "$limit" "$LAB/loadgen.json" "$LOADGEN" "$@" "from=$RUN-$SRC_NS" "to=$RUN-$DST_NS" "dst=$DST" "${CPU[@]}" && return 0
    failed "$(cat "$LAB/loadgen.json.err")"
    return 1
}
answer() { json_num "$1" <"$LAB/loadgen.json"; }

udp() { # PAYLOAD
    local name=udp$1 size=$1 flows max
    max=$(($(overlay_mtu "$outer") - (inner == 6 ? 48 : 28)))
    [ "$size" -le "$max" ] || size=$max # nothing is to be fragmented; raw sends the same size
    for flows in ${FLOWS//,/ }; do
        name=udp$1
        [ "$flows" = 1 ] || name=$name"x"$flows
        loadgen $((SECS + 10)) udp "size=$size" "secs=$SECS" "flows=$flows" && {
            sample "${name}_blast" "$(answer received_pps)" pps
            sample "${name}_reordered" "$(answer reordered)" count
        }
        loadgen $((SECS * 4 + 20)) search "size=$size" "secs=$SECS" "flows=$flows" loss=0.5 &&
            sample "${name}_paced" "$(answer pps)" pps
    done
}

rtt() {
    loadgen $((SECS + 10)) rtt size=64 "secs=$SECS" && {
        sample rtt_p50 "$(answer p50_us)" us
        sample rtt_p99 "$(answer p99_us)" us
        sample rtt_lost "$(answer lost)" count
    }
    iperf_server
    spawn "$SRC_NS" "$LAB/iperf-bulk.log" "${PIN_A[@]}" timeout -k 2 $((SECS + 12)) iperf3 -c "$DST" -C cubic -t $((SECS + 2))
    local bulk=$LAST
    sleep 1
    loadgen $((SECS + 10)) rtt size=64 "secs=$SECS" && {
        sample rtt_tcp_p50 "$(answer p50_us)" us
        sample rtt_tcp_p99 "$(answer p99_us)" us
        sample rtt_tcp_lost "$(answer lost)" count
    }
    end_processes "$bulk" "$SERVER"
}

crr() {
    loadgen $((SECS + 10)) crr "secs=$SECS" && {
        sample crr "$(answer per_s)" conn/s
        sample crr_failed "$(answer failed)" count
    }
}

compute() { # a program on each CPU that does nothing but that; sets COMPUTING
    local n
    COMPUTING=()
    for n in $(seq "$(nproc)"); do
        spawn a "$LAB/compute-$n.log" timeout -k 2 $((per + 60)) sh -c 'while :; do :; done'
        COMPUTING+=("$LAST")
    done
}

bring_up() {
    case $contender in
    raw | kvxlan | meshd | meshd-wg | wggo) "up_$contender" ;;
    *) plug_in "$contender" ;;
    esac
}

one_case() {
    local kind=veth t
    LINE='' OVERLAY_HOST=1 POD_MTU=$(overlay_mtu "$outer")
    [ "$from" != bridged ] || kind=bridge OVERLAY_HOST=0
    if ! { node_add a 1 && node_add b 2 && pair a b && profile "$p" a b; }; then
        failed "no topology"
        return
    fi
    if [ "$from" = nodes ]; then
        SRC_NS=a DST_NS=b DST=$(overlay b "$inner")
    else
        if ! { pod_add a 1 $kind && pod_add b 1 $kind; }; then
            failed "no pods"
            return
        fi
        SRC_NS=a.1 DST_NS=b.1 DST=$(host_address b 2 "$inner")
    fi
    if ! { bring_up && wait_for 10 pings "$SRC_NS" "$DST"; }; then
        failed "did not come up"
        return
    fi
    [ -z "$BUSY" ] || compute
    for t in ${TESTS//,/ }; do
        case $t in
        tcp) tcp 1; tcp 4 ;;
        udp) udp 64; udp 1400 ;;
        rtt) rtt ;;
        crr) crr ;;
        esac
    done
    [ -z "$BUSY" ] || end_processes "${COMPUTING[@]}"
    down
}

# ------------------------------------------------------------- the result

table() {
    awk -F'\t' -v markdown="$MARKDOWN" -v order="${CONTENDERS//,/ }" '
        function sort(v, n,    i, j, x) { for (i = 2; i <= n; i++) { x = v[i]; for (j = i - 1; j > 0 && v[j] > x; j--) v[j + 1] = v[j]; v[j + 1] = x } }
        function short(x) { return x >= 100000 ? sprintf("%.0fk", x / 1000) : x >= 1000 ? sprintf("%.1fk", x / 1000) : x >= 100 ? sprintf("%.0f", x) : x >= 10 ? sprintf("%.1f", x) : sprintf("%.2f", x) }
        function summary(list, ratio,    v, n, m) {
            n = split(list, v, " ")
            if (!n) return "-"
            for (m = 1; m <= n; m++) v[m] += 0
            sort(v, n)
            m = n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
            if (n == 1) return ratio ? sprintf("%.2f", m) : short(m)
            return ratio ? sprintf("%.2f (%.2f-%.2f)", m, v[1], v[n]) : short(m) " (" short(v[1]) "-" short(v[n]) ")"
        }
        function row(cells, n,    i, s) {
            for (i = 1; i <= n; i++) s = s (markdown ? "| " : "") sprintf("%-*s", width[i], cells[i]) (markdown ? " " : "  ")
            print markdown ? s "|" : s
        }
        {
            key = $1 FS $2 FS $3 FS $4 FS $7 FS $8
            if ($8 == "segments") next
            if ($8 == "count") { if ($9 > 0) nonzero[$5 ", profile " $1 ", " $4 ", v" $3 " in v" $2 ": " $7] += $9; next }
            if (!(key in seen)) { seen[key] = 1; keys[++nkeys] = key }
            value[key, $5, $6] = $9
            list[key, $5] = list[key, $5] " " $9
            if ($6 > rounds) rounds = $6
        }
        END {
            nc = split(order, c, " ")
            h = split("profile,family,from,metric,unit", head, ",")
            for (i = 1; i <= nc; i++) head[++h] = c[i]
            for (i = 1; i <= nc; i++) if (c[i] == "kvxlan") kernel = 1
            for (i = 1; i <= nc; i++) if (kernel && c[i] != "kvxlan" && c[i] != "raw") head[++h] = c[i] " : kvxlan"
            for (i = 1; i <= h; i++) { cell[0, i] = head[i]; width[i] = length(head[i]) }
            for (k = 1; k <= nkeys; k++) {
                split(keys[k], part, FS)
                col = 0
                cell[k, ++col] = part[1]; cell[k, ++col] = "v" part[3] " in v" part[2]; cell[k, ++col] = part[4]; cell[k, ++col] = part[5]; cell[k, ++col] = part[6]
                for (i = 1; i <= nc; i++) cell[k, ++col] = summary(list[keys[k], c[i]], 0)
                for (i = 1; i <= nc; i++) if (kernel && c[i] != "kvxlan" && c[i] != "raw") {
                    ratios = ""
                    for (r = 1; r <= rounds; r++)
                        if ((keys[k], c[i], r) in value && value[keys[k], "kvxlan", r] > 0) ratios = ratios " " value[keys[k], c[i], r] / value[keys[k], "kvxlan", r]
                    cell[k, ++col] = summary(ratios, 1)
                }
                for (i = 1; i <= h; i++) if (length(cell[k, i]) > width[i]) width[i] = length(cell[k, i])
            }
            for (k = 0; k <= nkeys; k++) {
                for (i = 1; i <= h; i++) line[i] = cell[k, i]
                row(line, h)
                if (k == 0) {
                    for (i = 1; i <= h; i++) { line[i] = ""; for (j = 0; j < width[i]; j++) line[i] = line[i] "-" }
                    row(line, h)
                }
            }
            for (n in nonzero) print (markdown ? "\n" : "") "not zero: " n " " nonzero[n]
        }' "$SAMPLES"
}

count() { echo "$1" | tr ',' '\n' | grep -c .; }
per=2
[[ ,$TESTS, != *,tcp,* ]] || per=$((per + 2 * SECS + 1))
[[ ,$TESTS, != *,udp,* ]] || per=$((per + 2 * $(count "$FLOWS") * (SECS * 5 / 2 + 1)))
[[ ,$TESTS, != *,rtt,* ]] || per=$((per + 2 * SECS + 2))
[[ ,$TESTS, != *,crr,* ]] || per=$((per + SECS))
cases=$(($(count "$PROFILES") * $(count "$OUTER") * $(count "$INNER") * $(count "$FROM") * $(count "$CONTENDERS")))
total=$((ROUNDS * cases))
say "Linux $(uname -r), $(nproc) CPUs${PIN:+, pinned}${BUSY:+, busy}; $ROUNDS rounds of $cases cases, about $((total * per / 60 + 1)) minutes"

FAILED='' done=0
read -ra ring <<<"${CONTENDERS//,/ }"
for round in $(seq "$ROUNDS"); do
    for p in ${PROFILES//,/ }; do
        for outer in ${OUTER//,/ }; do
            for inner in ${INNER//,/ }; do
                for from in ${FROM//,/ }; do
                    for contender in "${ring[@]}"; do
                        done=$((done + 1))
                        [ -z "$CLEAR" ] || printf '%s[%d/%d] %s %s %s' "$CLEAR" "$done" "$total" "$p" "$from" "$contender"
                        one_case
                        take_down
                        printf '%s[%d/%d] round %d  %s v%sin%s %-7s %-7s%s\n' "$CLEAR" "$done" "$total" "$round" "$p" "$inner" "$outer" "$from" "$contender" "$LINE"
                    done
                done
            done
        done
    done
    ring=("${ring[@]:1}" "${ring[0]}") # nobody is always first
done

say
say "Medians (min-max) of $ROUNDS interleaved rounds; the ratio to kvxlan is taken in each round. Linux $(uname -r), $(nproc) CPUs${PIN:+, pinned}${BUSY:+, busy}, ${SECS} s each."
say "More is better for Gbit/s, pps and conn/s; less for s/GB (CPU seconds of the whole machine) and us."
say
table
[ -z "$JSON" ] || say "samples: $JSON"
[ -z "$FAILED" ] || die "not every measurement succeeded (see the warnings above)"
