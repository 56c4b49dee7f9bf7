#!/usr/bin/env bash
# test.sh [STEP…]: everything that must hold before a change lands. Without
# arguments all steps, in this order; it stops at the first that fails.
#
#   fmt  clippy  test  bench  shell  deny
#
# "test" holds unit, simulation and fuzz-regression tests, and the netns tests:
# those need root and /dev/net/tun, and say SKIPPED with the reason elsewhere.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/database.sh"

ALL=(fmt clippy test bench shell deny)
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
for s; do [[ " ${ALL[*]} " == *" $s "* ]] || { echo "test.sh: no step '$s'; there are: ${ALL[*]}" >&2; exit 2; }; done
[ $# -gt 0 ] || set -- "${ALL[@]}"

lab_begin
cd "$ROOT" || exit 1
need_cargo

step_fmt() {
    cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt || return 1
    cargo fmt --all --check
}
step_clippy() {
    cargo clippy --version >/dev/null 2>&1 || rustup component add clippy || return 1
    cargo clippy --locked --all-targets -- -D warnings
}
step_test() {
    # what the netns tests call; without it they are skipped and say so
    want ip:iproute2 curl:curl ping:iputils-ping ethtool:ethtool iperf3:iperf3 tshark:tshark tcpdump:tcpdump capsh:libcap2-bin \
        setpriv:util-linux setsid:util-linux nft:nftables iptables:iptables tc:iproute2 faketime:faketime strace:strace \
        unshare:util-linux nsenter:util-linux jq:jq wg:wireguard-tools \
        wireguard-go:wireguard-go vtysh:frr bird:bird2 || true
    other_wireguard
    databases
    [ "$(id -u)" = 0 ] || say "not root: netns tests will be skipped"
    cargo test --locked
}
# A second implementation of WireGuard beside Debian's. Where it cannot be had its story is skipped and says so.
other_wireguard() {
    PATH=$PATH:$ROOT/target/tools/bin
    export PATH
    command -v boringtun-cli >/dev/null || cargo install --quiet --locked --root "$ROOT/target/tools" boringtun-cli || true
}
# that they build and link; whoever measures builds them with optimisation
step_bench() { cargo bench --locked --no-run --profile dev; }
step_shell() {
    if ! want shellcheck:shellcheck; then
        echo "SKIPPED: no shellcheck"
        return 3
    fi
    (cd "$SCRIPTS" && shellcheck ./*.sh) && shellcheck .ci/run &&
        cc -O2 -Wall -Wextra -Werror -pthread -o "$LAB/loadgen" "$SCRIPTS/loadgen.c"
}
step_deny() {
    if ! cargo deny --version >/dev/null 2>&1; then
        echo "SKIPPED: cargo-deny is not installed (cargo install cargo-deny)"
        return 3
    fi
    cargo deny check
}

n=0 t_all=$SECONDS results=()
for s; do
    n=$((n + 1)) t0=$SECONDS
    printf '\n%s[%d/%d] %s%s\n' "$BOLD" $n $# "$s" "$PLAIN"
    background "step_$s"
    wait "$LAST"
    rc=$?
    forget "$LAST"
    case $rc in
    0) results+=("$(printf '%-7s %4d s  ok' "$s" $((SECONDS - t0)))") ;;
    3) results+=("$(printf '%-7s %4d s  skipped' "$s" $((SECONDS - t0)))") ;;
    *)
        results+=("$(printf '%-7s %4d s  %sFAILED%s' "$s" $((SECONDS - t0)) "$RED" "$PLAIN")")
        printf '\n'
        printf '%s\n' "${results[@]}"
        printf '\n%sFAILED%s at %s after %d s; its output stands above\n' "$RED" "$PLAIN" "$s" $((SECONDS - t_all))
        exit 1
        ;;
    esac
done
printf '\n'
printf '%s\n' "${results[@]}"
printf '\n%sall good%s in %d s\n' "$GREEN" "$PLAIN" $((SECONDS - t_all))
