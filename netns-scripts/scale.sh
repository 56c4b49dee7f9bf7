#!/usr/bin/env bash
# scale.sh [NODES]: a node whose list names so many others (100000 unless said): how long
# it takes to start, how much memory a peer costs, and what a change of one peer costs
# while packets are carried. An emptied list must be held back.
#
#   node a: meshd, with the long list       node b: meshd, with a list of two
#
# Both are network namespaces, removed in the end. Exit code 0 only if all of it holds
# and memory stays within 64 MiB + 16 KiB a peer.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
*[!0-9]* | 0) echo "usage: scale.sh [NODES]" >&2; exit 2 ;;
esac
need_root "$@"
PEERS=${1:-100000}
[ "$PEERS" -le 260000 ] || die "at most 260000 fit into the address ranges used here"

lab_begin
need ip:iproute2 jq:jq ping:iputils-ping
need_namespaces
need_tun
build
{ node_add a 1 && node_add b 2 && pair a b; } || die "no namespaces"
write_nodes 4 a b
cp "$LAB/nodes.yaml" "$LAB/two.yaml"
start_meshd b 4
meshd_ready b || die "meshd does not come up"

many() { # MOVED: the list; the last node's address depends on MOVED
    cat "$LAB/two.yaml"
    awk -v n="$PEERS" -v moved="$1" 'BEGIN { for (i = 0; i < n; i++) {
        a = int(i / 65536); b = int(i / 256) % 256; c = i % 256
        # 172.16.0.0/12 outside, 10.128.0.0/9 inside, sixteen addresses each
        printf "  - name: node-%d\n    underlay: 172.%d.%d.%d\n", i, 16 + a + (i == n - 1 ? 4 * moved : 0), b, c
        j = i * 16
        printf "    subnets: [10.%d.%d.%d/28, \"fd43:%x:%x::/48\"]\n", 128 + int(j / 65536), int(j / 256) % 256, j % 256, a, i % 65536
    } }'
}
put() { mv "$LAB/new.yaml" "$LAB/many.yaml"; } # in one go
seconds() { # SINCE (microseconds)
    local now=${EPOCHREALTIME//[!0-9]/}
    awk -v t="$((now - $1))" 'BEGIN { printf "%.2f", t / 1e6 }'
}
kib() { awk -v k="$1:" '$1 == k { print $2 }' "/proc/${DAEMON[a]}/status"; }
cpu() { awk '{ sub(/.*\) /, ""); print ($12 + $13) / 100 }' "/proc/${DAEMON[a]}/stat"; }

step "A list of $PEERS nodes"
many 0 >"$LAB/many.yaml"
note "$(wc -c <"$LAB/many.yaml") bytes"
t0=${EPOCHREALTIME//[!0-9]/}
mkdir -p "$LAB/a"
printf 'node-name: a\nnode-ip: "%s"\nnodes-file: %s\ndata-dir: %s\nsocket: %s\n' \
    "$(underlay a)" "$LAB/many.yaml" "$LAB/a/data" "$LAB/a/meshd.sock" >"$LAB/a/config.yaml"
spawn a "$LAB/a/meshd.log" "$MESHD" run --config "$LAB/a/config.yaml"
DAEMON[a]=$LAST
wait_for 60 ctl a status || die "it does not become ready: $(tail -n 3 "$LAB/a/meshd.log")"
good "ready after $(seconds "$t0") s, $(cpu) s of CPU"
wait_for 5 pings a "$(overlay b)" || die "nothing is carried"
rss=$(kib VmRSS)
limit=$((64 * 1024 + 16 * PEERS))
[ "$rss" -le $limit ] || die "$rss KiB of memory, more than $limit"
good "$((rss / 1024)) MiB of memory ($((rss * 1024 / PEERS)) bytes a peer; at start at most $(($(kib VmHWM) / 1024)) MiB)"

t0=${EPOCHREALTIME//[!0-9]/}
ctl a peers --json >"$LAB/peers.json" || die "meshctl peers fails"
good "meshctl peers --json: $(jq length "$LAB/peers.json") peers, $(wc -c <"$LAB/peers.json") bytes in $(seconds "$t0") s"
[ "$(jq length "$LAB/peers.json")" = $((PEERS + 1)) ] || die "that is not all of them"

step "One of them changes"
on a ping -n -q -i 0.01 -w 60 "$(overlay b)" >"$LAB/ping" 2>&1 &
ping=$!
remember $ping
sleep 1
last="node-$((PEERS - 1))"
endpoint() { ctl a peers --json | jq -r --arg n "$last" '.[] | select(.name == $n) | .endpoint'; }
before=$(endpoint) c0=$(cpu)
many 1 >"$LAB/new.yaml"
t0=${EPOCHREALTIME//[!0-9]/}
put
taken_over() { grep -q "node list: " "$LAB/a/meshd.log"; }
wait_for 60 taken_over || die "the change is not taken over: $(tail -n 3 "$LAB/a/meshd.log")"
good "taken over after $(seconds "$t0") s, $(awk -v a="$c0" -v b="$(cpu)" 'BEGIN { printf "%.2f", b - a }') s of CPU"
sleep 1
[ "$(endpoint)" != "$before" ] || die "but $last is still at $before"
cp "$LAB/two.yaml" "$LAB/new.yaml"
t0=${EPOCHREALTIME//[!0-9]/}
put
held() { [[ $(ctl a status) == *"meshctl nodes accept"* ]]; }
wait_for 60 held || die "a list without nearly all nodes was not held back"
good "a list without $PEERS of them is held back, after $(seconds "$t0") s"
kill -INT $ping
wait $ping
forget $ping
read -r sent got < <(sed -n 's/^\([0-9]*\) packets transmitted, \([0-9]*\) received.*/\1 \2/p' "$LAB/ping")
if [ "${sent:-0}" -le 100 ] || [ $((sent - got)) -gt 1 ]; then die "$((sent - got)) of $sent pings lost meanwhile"; fi
good "$got of $sent pings answered meanwhile; $(sed -n 's/^rtt //p' "$LAB/ping")"
c0=$(cpu)
sleep 5
good "at rest $(awk -v a="$c0" -v b="$(cpu)" 'BEGIN { printf "%.1f", (b - a) / 5 * 100 }') % of a CPU, $(($(kib VmRSS) / 1024)) MiB"
say
say "${GREEN}all of it holds$PLAIN"
