#!/usr/bin/env bash
# fuzz.sh MINUTES [TARGET…]: runs the fuzz targets of fuzz/ one after another, for that
# long in total, from the committed corpora on. Needs cargo and a C++ compiler, no
# nightly toolchain: the flags that cargo-fuzz would set are set here, without a
# sanitizer (nothing that is fuzzed is unsafe). With a nightly one
# `cargo fuzz run TARGET` works as well.
#
# What is found on the way stays in fuzz/target/found/; a finding goes to
# fuzz/artifacts/, and the script says how to keep it. Exit code 0 only without one.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
-h | --help | '') sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; [ -n "${1:-}" ]; exit ;;
*[!0-9]* | 0) echo "usage: fuzz.sh MINUTES [TARGET…]" >&2; exit 2 ;;
esac
MINUTES=$1
shift
FUZZ=$ROOT/fuzz
ALL=(wire outbound inbound round_trip tunnel bfd config nodes_file admin)
for t; do [[ " ${ALL[*]} " == *" $t "* ]] || { echo "fuzz.sh: no target '$t'; there are: ${ALL[*]}" >&2; exit 2; }; done
[ $# -gt 0 ] || set -- "${ALL[@]}"
unset CARGO_TARGET_DIR

lab_begin
need_cargo
need c++:g++
HOST=$(rustc -vV | sed -n 's/^host: //p')
FLAGS=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0
    -Ccodegen-units=1 --cfg fuzzing)
build_targets() { (cd "$FUZZ" && RUSTFLAGS="${FLAGS[*]}" cargo build --release --target "$HOST"); }
busy "building the targets" build_targets || die "the targets do not build"

found=0
seconds=$((MINUTES * 60 / $#))
printf '\n%-12s %14s %10s %9s\n' target executions a-second corpus
for t; do
    longest=16384
    [ "$t" != round_trip ] || longest=512 # what is behind describes no packet any more
    mkdir -p "$FUZZ/target/found/$t" "$FUZZ/artifacts/$t"
    background "$FUZZ/target/$HOST/release/$t" "$FUZZ/target/found/$t" "$FUZZ/corpus/$t" \
        -max_total_time=$seconds -timeout=20 -rss_limit_mb=2048 -max_len=$longest -print_final_stats=1 \
        "-artifact_prefix=$FUZZ/artifacts/$t/" >"$LAB/$t" 2>&1
    pid=$LAST
    wait "$pid"
    rc=$?
    forget "$pid"
    number() { sed -n "s/^stat::$1: *//p" "$LAB/$t"; }
    printf '%-12s %14s %10s %9s' "$t" "$(number number_of_executed_units)" "$(number average_exec_per_sec)" \
        "$(find "$FUZZ/target/found/$t" -type f | wc -l)"
    if [ $rc = 0 ]; then
        printf '\n'
        continue
    fi
    found=1
    input=$(sed -n 's/.*Test unit written to //p' "$LAB/$t" | tail -n1)
    printf '  %sFINDING%s\n' "$RED" "$PLAIN"
    grep -A6 -m1 'panicked at\|ERROR: libFuzzer' "$LAB/$t" | cut -c1-400
    say "again:    $FUZZ/target/$HOST/release/$t $input"
    say "shrink:   … -minimize_crash=1 -runs=100000 $input"
    say "keep:     cp $input $ROOT/tests/regressions/$t-WHAT-IT-IS.bin, and cargo test --test corpus"
done
[ $found = 0 ] || exit 1
say
say "${GREEN}nothing was found$PLAIN in $MINUTES minutes"
