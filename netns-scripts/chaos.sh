#!/usr/bin/env bash
# chaos.sh [SEED [MINUTES]]: faults under load. Three servers with an etcd of their own, two
# agents with traffic between them, and clients that make, use and revoke tokens, join, remove
# and drain nodes at whichever server, for so many minutes (10 unless said). Meanwhile, one
# after the other, in an order and with durations that follow from SEED alone:
#
#   kill-leader     the etcd that leads is killed
#   kill-server     all of the leader's server is, and starts again a little later
#   kill-sidecar    the leader's mesh-sidecar is
#   pause-etcd  pause-sidecar  pause-server     SIGSTOP, and SIGCONT a little later
#   cut  cut-in  cut-out     a server hears no other server and is not heard; one way alone
#   alone           it is cut off from everybody
#   disk-full       no byte is left for a server's data, and its etcd starts again meanwhile
#   slow-disk       each write of a server's etcd takes 0.2 s longer to be on the disk
#   restart-all     all servers are killed at once, and start again
#   clock           a server's clock is an hour off, both processes that look at it start anew
#
#   +---------+ +---------+ +---------+   +---------+ ~~~ packets ~~~ +---------+   +---------+
#   | server a| | server b| | server c|   | agent p | <-------------> | agent q |   | clients |
#   +----+----+ +----+----+ +----+----+   +----+----+                 +----+----+   +----+----+
#   =====+===========+===========+=============+===========================+=============+== br0
#
# Each client writes down what it was told. In the end all servers have to tell the same;
# nothing that was acknowledged may be lost; a token for one node may have let in one; a subnet
# has one owner; and of p's and q's packets not one is lost. What a run took is printed: the
# longest time without an acknowledged write, and the time from a fault's end until each
# server is good again. (etcd reads the kernel's clock: "clock" is meshd and mesh-sidecar.)
#
# STORE=mysql or STORE=postgres puts a MariaDB or PostgreSQL server on a machine of its own in
# the place of the etcds: what hits an etcd hits the database then, the servers are equals, and
#
#   kill-db  pause-db   the database is killed, and starts again a little later; SIGSTOP, SIGCONT
#   cut  cut-in  cut-out     a server and the database do not hear each other; one way alone
#
# FAULTS=N ends the run after so many faults, however long that takes unless MINUTES are given.
# ONLY="FAULT FAULT…" limits the faults, NODES=N is how many agents stay connected (20), DRY=1
# prints the schedule, OUT=FOLDER keeps the history and the logs, and SABOTAGE=1 changes the
# datastore behind the servers' back, which has to be found. Exit code 0 only if all of it holds.
# shellcheck disable=SC2046,SC2086 # lists of pids are words
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/database.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
*[!0-9]*) echo "usage: chaos.sh [SEED [MINUTES]]" >&2; exit 2 ;;
esac
case ${2:-10} in *[!0-9]*) echo "usage: chaos.sh [SEED [MINUTES]]" >&2; exit 2 ;; esac
SEED=${1:-$((RANDOM * 32768 + RANDOM))}
FAULTS=${FAULTS:-}
case $FAULTS in *[!0-9]*) die "FAULTS is how many there are to be: a number" ;; esac
MINUTES=${2:-$([ -n "$FAULTS" ] && echo 600 || echo 10)}
STORE=${STORE:-etcd}
SERVERS=(a b c)
declare -A HOLDER=()

# ------------------------------------------------------------ the schedule

# As often as they stand here; what kills a leader is half of it.
BAG=(kill-leader kill-leader kill-leader kill-leader kill-leader kill-leader kill-server kill-server kill-server
    kill-sidecar kill-sidecar pause-etcd pause-sidecar pause-server cut cut cut-in cut-out alone disk-full slow-disk
    restart-all clock)
MAY_FAIL=1
case $STORE in
etcd) ;;
mysql | postgres)
    BAG=(kill-db kill-db kill-db pause-db pause-db kill-server kill-server kill-server kill-sidecar pause-sidecar
        pause-server pause-server cut cut cut-in cut-in cut-out cut-out alone disk-full slow-disk restart-all clock)
    MAY_FAIL=2
    ;;
*) die "no STORE '$STORE'; there are: etcd mysql postgres" ;;
esac
# shellcheck disable=SC2206
[ -z "${ONLY:-}" ] || BAG=($ONLY)

schedule() { # lines of FAULT WHOM SECONDS PAUSE: WHOM is leader, a, b, c, db or all
    local i left whom
    RANDOM=$((SEED % 32768)) # this very sequence for this very seed
    for ((i = 0; i < SEED / 32768 % 97; i++)); do : $RANDOM; done
    for ((i = 0; i < ${FAULTS:-1000}; )); do
        left=("${BAG[@]}")
        while [ ${#left[@]} -gt 0 ] && [ $((i++)) -lt "${FAULTS:-1000}" ]; do
            local at=$((RANDOM % ${#left[@]}))
            whom=${SERVERS[RANDOM % 3]}
            if [ $STORE = etcd ]; then
                [ $((RANDOM % 2)) = 0 ] || whom=leader
                case ${left[at]} in kill-*) whom=leader ;; esac
            fi
            case ${left[at]} in restart-all) whom=all ;; kill-db | pause-db) whom=db ;; disk-full | slow-disk) [ $STORE = etcd ] || whom=db ;; esac
            echo "${left[at]} $whom $((RANDOM % 14 + 1)) $((RANDOM % 3)).$((RANDOM % 10))"
            left=("${left[@]:0:at}" "${left[@]:at+1}")
        done
    done
}
if [ -n "${DRY:-}" ]; then
    schedule
    exit
fi

need_root "$@"
lab_begin
need ip:iproute2 nft:nftables jq:jq strace:strace faketime:faketime nsenter:util-linux unshare:util-linux
case $STORE in
etcd) need etcd:etcd-server etcdctl:etcd-client ;;
*) databases ;;
esac
need_namespaces
need_tun
build
need_cargo
FAKETIME=$(compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' | head -n1)
[ -n "$FAKETIME" ] || die "libfaketime is not where Debian has it"
CHAOS=${CHAOS:-$(cd "$ROOT" && cargo test --quiet --locked --no-run --test chaos --message-format=json 2>/dev/null |
    jq -r 'select(.target.name == "chaos") | .executable // empty' | tail -n1)}
[ -x "$CHAOS" ] || die "the clients cannot be built: cargo test --no-run --test chaos"

# ----------------------------------------------------------------- the lab

# Each server's data lies on a small disk of its own, in a mount namespace that a sleeper holds; so does a database's.
server_add() { # NAME NUMBER
    node_add "$1" "$2" && plug "$1" || return 1
    mkdir -p "$LAB/$1/data"
    echo +0 >"$LAB/$1/clock"
    # shellcheck disable=SC2016
    spawn "$1" "$LAB/$1/disk.log" unshare -m sh -c 'mount -t tmpfs -o "size=$2" none "$1" && exec sleep infinity' \
        sh "$LAB/$1/data" "${DISK:-400m}"
    HOLDER[$1]=$LAST
    wait_for 5 mounted "$1"
}
mounted() { [ "$(cat "/proc/${HOLDER[$1]}/comm")" = sleep ]; }
disk() { printf '/proc/%d/root%s' "${HOLDER[$1]}" "$LAB/$1/data"; }

server_start() { # NAME
    nsenter --target "${HOLDER[$1]}" --net --mount env "LD_PRELOAD=$FAKETIME" "FAKETIME_TIMESTAMP_FILE=$LAB/$1/clock" \
        FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1 \
        "$MESHD" server --config "$LAB/$1/config.yaml" >>"$LAB/$1/meshd.log" 2>&1 </dev/null &
    DAEMON[$1]=$!
    remember "${DAEMON[$1]}"
    disown "${DAEMON[$1]}" # that it is killed is no news
}

pids() { # NAME [COMM…]: of the server's processes, those of that name
    local p comm
    for p in $(ip netns pids "$RUN-$1"); do
        comm=$(cat "/proc/$p/comm" 2>/dev/null) || continue
        [[ " ${*:2} " != *" $comm "* ]] || echo "$p"
    done
}
all_of() { pids "$1" meshd mesh-sidecar etcd; }
send() { # SIGNAL PID…
    local sig=$1
    shift
    [ $# = 0 ] || kill "-$sig" "$@" 2>/dev/null
}

kill_all() { # NAME…: as machines that lose their power
    local n p
    mapfile -t gone < <(for n; do all_of "$n"; done)
    send KILL "${gone[@]}"
    for p in "${gone[@]}"; do
        while [[ $(proc_state "$p") == [!Z] ]]; do sleep 0.02; done
    done
    for n; do forget "${DAEMON[$n]}"; done
}

leader() { # the name of the server whose etcd leads, as any tells
    local n name i
    for ((i = 0; i < 100; i++)); do
        for n in "${SERVERS[@]}"; do
            name=$(timeout 5 "$MESHCTL" --socket "$LAB/$n/meshd.sock" --json cluster status 2>/dev/null |
                jq -r '.servers[] | select(.datastore == "leader") | .name' 2>/dev/null | head -n1)
            [ -z "$name" ] || { echo "$name"; return; }
        done
        sleep 0.1
    done
    return 1
}

is_good() { # NAME: it sees all, and stores something
    timeout 10 "$MESHCTL" --socket "$LAB/$1/meshd.sock" --json cluster status >"$LAB/$1/status" 2>/dev/null &&
        [ "$(jq -r .tolerance "$LAB/$1/status")" = $MAY_FAIL ] &&
        timeout 20 "$MESHCTL" --socket "$LAB/$1/meshd.sock" --json token create --ttl 60s >/dev/null 2>&1
}
all_good() {
    local n
    for n in "${SERVERS[@]}"; do is_good "$n" || return 1; done
}
# A machine that stands still itself, as a laptop that sleeps, tells nothing: seconds of that are not counted.
tick() {
    local last=$SECONDS still=0
    echo 0 >"$LAB/still"
    while sleep 1; do
        [ $((SECONDS - last)) -le 5 ] || { still=$((still + SECONDS - last)) && echo $still >"$LAB/still"; }
        last=$SECONDS
    done
}
still() { cat "$LAB/still"; }
until_good() { # SECS
    local start=$((SECONDS - $(still)))
    until all_good; do
        sleep 0.1
        [ $((SECONDS - $(still) - start)) -lt "$1" ] || return 1
    done
}

ms() {
    local t=${EPOCHREALTIME//[!0-9]/}
    echo $((t / 1000))
}

# -------------------------------------------------------------- the faults

others_of() { # NAME: the other servers' addresses; the database's, where there is one
    local n all=()
    [ $STORE = etcd ] || { underlay db; return; }
    for n in "${SERVERS[@]}"; do [ "$n" = "$1" ] || all+=("$(underlay "$n")"); done
    local IFS=,
    echo "${all[*]}"
}
cut_off() { # NAME FAULT: cut, cut-in, cut-out or alone
    local rules="add table inet chaos;" in out
    in="ip saddr { $(others_of "$1") }" out="ip daddr { $(others_of "$1") }"
    [ "$2" != alone ] || { in='iif != "lo"' out='oif != "lo"'; }
    [ "$2" = cut-out ] || rules+="add chain inet chaos in { type filter hook input priority -300; }; add rule inet chaos in $in drop;"
    [ "$2" = cut-in ] || rules+="add chain inet chaos out { type filter hook output priority -300; }; add rule inet chaos out $out drop;"
    on "$1" nft "$rules"
}

harm() { # FAULT NAME SECONDS: does it, waits, and undoes it; ENDED is when nothing was in the way any more
    local n=$2 secs=$3 p tasks
    case $1 in
    kill-db)
        database_kill
        sleep $((secs / 2))
        database_start
        ;;
    pause-db)
        p=$(database_pids)
        send STOP $p
        sleep "$secs"
        send CONT $p
        ;;
    kill-leader) send KILL $(pids "$n" etcd) ;;
    kill-sidecar) send KILL $(pids "$n" mesh-sidecar) ;;
    kill-server)
        kill_all "$n"
        sleep $((secs / 2))
        server_start "$n"
        ;;
    pause-etcd | pause-sidecar | pause-server)
        case $1 in
        pause-etcd) p=$(pids "$n" etcd) ;;
        pause-sidecar) p=$(pids "$n" mesh-sidecar) ;;
        *) p=$(all_of "$n") ;;
        esac
        send STOP $p
        sleep "$secs"
        send CONT $p
        ;;
    cut | cut-in | cut-out | alone)
        cut_off "$n" "$1" || die "$n cannot be cut off"
        sleep $((secs + 5))
        on "$n" nft delete table inet chaos
        ;;
    disk-full)
        dd if=/dev/zero of="$(disk "$n")/fill" bs=64k status=none 2>/dev/null
        dd if=/dev/zero of="$(disk "$n")/more" bs=512 status=none 2>/dev/null
        sleep 1
        send KILL $(pids "$n" etcd)
        sleep "$secs"
        rm -f "$(disk "$n")/fill" "$(disk "$n")/more"
        # a database that ended over it is started again by whoever looks after it
        [ "$n" != db ] || database_answers || { database_kill && database_start; }
        ;;
    slow-disk)
        mapfile -t tasks < <(if [ "$n" = db ]; then database_pids; else pids "$n" etcd | head -n1; fi)
        [ ${#tasks[@]} -gt 0 ] || return 0
        strace -f -qq -o /dev/null -e trace=fdatasync,fsync -e inject=fdatasync,fsync:delay_exit=200000 "${tasks[@]/#/-p}" >/dev/null 2>&1 &
        p=$!
        remember $p
        sleep $((secs + 5))
        end_processes $p
        ;;
    restart-all)
        kill_all "${SERVERS[@]}"
        for n in "${SERVERS[@]}"; do server_start "$n"; done
        ;;
    clock)
        if [ $((secs % 2)) = 0 ]; then echo +3600; else echo -3600; fi >"$LAB/$n/clock"
        sleep 2
        send KILL $(pids "$n" mesh-sidecar)
        sleep "$secs"
        echo +0 >"$LAB/$n/clock"
        ;;
    *) die "no fault '$1'; see chaos.sh --help" ;;
    esac
    ENDED=$(ms)
}

keep() { # OUT=FOLDER: what there is to look at
    local n
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT"
    cp "$LAB/chaos"/* "$LAB/clients.log" "$LAB/db.log" "$OUT" 2>/dev/null
    for n in "${SERVERS[@]}" p q; do cp "$LAB/$n/meshd.log" "$OUT/$n.log"; done
}
logs() { # when something does not come back
    local n
    keep
    for n in "${SERVERS[@]}"; do
        printf '\n--- %s: %s\n' "$n" "$(timeout 5 "$MESHCTL" --socket "$LAB/$n/meshd.sock" cluster status 2>&1)" >&2
        tail -n "${1:-25}" "$LAB/$n/meshd.log" >&2
    done
}

# ---------------------------------------------------------------- the run

tick &
remember $!
switch_add || die "no bridge"
i=0
for n in "${SERVERS[@]}"; do
    i=$((i + 1))
    server_add "$n" $i || die "no namespace for server $n"
done
for n in p q x; do
    i=$((i + 1))
    { node_add $n $i && plug $n; } || die "no namespace for $n"
done
[ $STORE = etcd ] || { server_add db $((i + 1)) && database_make && database_start && wait_for 60 database_answers; } ||
    { tail -n 20 "$LAB/db.log" >&2; die "the database does not start"; }
for n in "${SERVERS[@]}"; do
    printf 'node-name: %s\nnode-ip: "%s"\ndata-dir: %s\nsocket: %s\ncluster-cidr: 10.64.0.0/10\n' \
        "$n" "$(underlay "$n")" "$LAB/$n/data" "$LAB/$n/meshd.sock" >"$LAB/$n/config.yaml"
    case $STORE in
    etcd) [ "$n" != a ] || echo 'cluster-init: true' >>"$LAB/a/config.yaml" ;;
    *) printf 'datastore-endpoint: %s://mesh@%s/meshd\ndatastore-password-file: %s\n' $STORE "$(underlay db)" "$LAB/db.password" >>"$LAB/$n/config.yaml" ;;
    esac
done

step "Three servers, two agents"
t0=$(ms)
server_start a
meshd_ready a || die "server a does not come up"
note "the first serves after $(($(ms) - t0)) ms"
MESHD_TOKEN=$(ctl a token create --role server) || die "no token"
export MESHD_TOKEN
t0=$(ms)
for n in b c; do server_start $n; done
until_good 120 || { logs; die "there are no three servers"; }
good "two more joined at once, and all are good, after $(($(ms) - t0)) ms"
MESHD_TOKEN=$(ctl a token create) || die "no token"
for n in p q; do start_member $n agent; done
meshd_ready p q || die "the agents do not come up"
unset MESHD_TOKEN
mesh_address() { ctl "$1" status --json | jq -r '.overlay_addresses[0]'; }
wait_for 20 pings p "$(mesh_address q)" || die "p does not reach q"

CHAOS_DIR=$LAB/chaos
mkdir "$CHAOS_DIR"
export CHAOS_DIR CHAOS_SEED=$SEED MESHCTL CHAOS_NODES=${NODES:-20}
CHAOS_SERVERS=$(for n in "${SERVERS[@]}"; do printf '%s,%s:9345,%s ' "$n" "https://$(underlay "$n")" "$LAB/$n/meshd.sock"; done)
CHAOS_FLOW="$RUN-p,$(mesh_address p) $RUN-q,$(mesh_address q)"
export CHAOS_SERVERS CHAOS_FLOW
spawn x "$LAB/clients.log" "$CHAOS" --ignored --exact load --nocapture
CLIENTS=$LAST
ready() { [ -e "$CHAOS_DIR/ready" ]; }
alive_or_ready() { ready || ! kill -0 "$CLIENTS" 2>/dev/null; }
wait_for 900 alive_or_ready
ready || { cat "$LAB/clients.log" >&2; logs; die "the clients do not start"; }
good "$(grep 'agents at once' "$LAB/clients.log")"

etcd_ctl() { # NAME ARGS…
    local n=$1
    shift
    nsenter --target "${HOLDER[$n]}" --net --mount env ETCDCTL_API=3 etcdctl --endpoints "https://$(underlay "$n"):2379" \
        --cacert "$LAB/$n/data/server/etcd/ca.pem" --cert "$LAB/$n/data/server/etcd/tls.pem" \
        --key "$LAB/$n/data/server/etcd/tls.pem" "$@"
}
sabotage() { # a member that was acknowledged vanishes
    local key
    [ $STORE = etcd ] || { database_sabotage || die "the datastore cannot be changed"; return; }
    key=$(etcd_ctl a get --prefix meshd/k/node/ -w json |
        jq -r '[.kvs[] | select(.value | @base64d | fromjson | .record.name | test("^n[0-9]"))][0].key | @base64d')
    printf '\ndel "%s"\nput "meshd/k/guard" ""\n\n\n' "$key" | etcd_ctl a txn || die "the datastore cannot be changed"
}

step "Faults, ${FAULTS:+$FAULTS of them, }at most $MINUTES minutes, seed $SEED${STORE:+, over $STORE}"
END=$((SECONDS - $(still) + MINUTES * 60)) count=0 kills=0
mapfile -t SCHEDULE < <(schedule)
if [ -n "${SABOTAGE:-}" ]; then
    sleep 10
    sabotage
    SCHEDULE=()
fi
for line in "${SCHEDULE[@]}"; do
    [ $((SECONDS - $(still))) -lt $END ] || break
    kill -0 "$CLIENTS" 2>/dev/null || { tail -n 30 "$LAB/clients.log" >&2; die "the clients have ended"; }
    read -r fault whom secs pause <<<"$line"
    sleep "$pause"
    at=$whom
    [ "$whom" != leader ] || at=$(leader) || { logs; die "nobody leads, before '$fault'"; }
    start=$(ms) stood=$(still)
    harm "$fault" "$at" "$secs"
    until_good 90 || { logs 60; die "after '$line' (at $at, $(date -u)) not all servers are good again within 90 s"; }
    now=$(ms)
    [ "$stood" != "$(still)" ] ||
        printf '{"fault":"%s","start":%d,"end":%d,"good":%d}\n' "$fault" "$start" "$ENDED" "$now" >>"$CHAOS_DIR/faults"
    count=$((count + 1))
    case $fault in kill-*) kills=$((kills + 1)) ;; esac
    note "$count. $fault at $at: good again $((now - ENDED)) ms after it$([ $((ENDED - start)) -lt 500 ] || echo " had lasted $((ENDED - start)) ms")"
done
touch "$CHAOS_DIR/stop"

step "What is there in the end"
ended() { ! kill -0 "$CLIENTS" 2>/dev/null; }
wait_for 600 ended || die "the clients do not end: $(tail -n 5 "$LAB/clients.log")"
wait "$CLIENTS"
rc=$?
forget "$CLIENTS"
sed -n '/packets lost/p; /clear answer/p; /all good after/,$p' "$LAB/clients.log" | grep -v -e '^test ' -e '^running'
keep
for n in p q; do
    books=$(ctl $n stats --json | jq -c '[.outbound, .inbound] | map(.in + .originated - .out - .dropped - .consumed)')
    [ "$books" = '[0,0]' ] || warn "$n's books: $books"
done
if [ -n "${SABOTAGE:-}" ]; then
    [ $rc != 0 ] || die "the sabotage was not found"
    grep -q 'which was acknowledged and is lost' "$LAB/clients.log" || die "the sabotage was not found, but something else"
    good "positive control: the sabotage was found"
    exit 0
fi
[ $rc = 0 ] || die "something is wrong; the same again: ${FAULTS:+FAULTS=$FAULTS }STORE=$STORE chaos.sh $SEED $MINUTES"
what=leaders
[ $STORE = etcd ] || what='servers or databases'
say "${GREEN}$count faults ($kills $what killed): nothing that was acknowledged is lost, and not one packet$PLAIN"
