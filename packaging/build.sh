#!/usr/bin/env bash
# build.sh: a Debian package of the release build in target/packages, for this machine's
# architecture and at least its glibc.
#
# cargo-deb is installed below target/ when it is missing. MESHD_BUILD_FLAGS are handed to `cargo build`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' packaging/build.sh; exit 0 ;; esac
[ $# = 0 ] || { echo "usage: packaging/build.sh" >&2; exit 2; }

target=${CARGO_TARGET_DIR:-target}
out=$target/packages
programs=(meshd meshctl mesh-sidecar)
read -ra flags <<<"${MESHD_BUILD_FLAGS:-}"
mkdir -p "$out"

manual() { # FOLDER of the programs
    rm -rf target/manual
    for program in "${programs[@]}"; do "$1/$program" manual target/manual; done
}

deb() {
    PATH=$PATH:$PWD/target/tools/bin
    command -v cargo-deb >/dev/null || cargo install --locked --root target/tools cargo-deb
    cargo build --locked --release "${flags[@]}"
    manual "$target/release"
    cargo deb --no-build --no-dbgsym --strip --output "$out/"
}

deb
