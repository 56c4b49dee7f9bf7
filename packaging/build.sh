#!/usr/bin/env bash
# build.sh [deb] [tarball]: what is handed out, in target/packages; both unless one is named.
#
#   deb       a Debian package of the release build, for this machine's architecture and at least its glibc
#   tarball   statically linked programs (musl) that run on any Linux, with the unit, the samples and the manual
#
# cargo-deb is installed below target/ when it is missing. MESHD_BUILD_FLAGS are handed to `cargo build`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' packaging/build.sh; exit 0 ;; esac
for what; do case $what in deb | tarball) ;; *) echo "usage: packaging/build.sh [deb] [tarball]" >&2; exit 2 ;; esac; done
[ $# -gt 0 ] || set -- deb tarball

target=${CARGO_TARGET_DIR:-target}
out=$target/packages
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
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

tarball() {
    local triple folder
    triple=$(uname -m)-unknown-linux-musl
    folder=meshd-$version-$(uname -m)
    command -v musl-gcc >/dev/null || {
        echo "build.sh: no musl-gcc, which C parts are compiled with: apt-get install musl-tools" >&2
        exit 1
    }
    rustup target add "$triple"
    cargo build --locked --release --target "$triple" "${flags[@]}"
    manual "$target/$triple/release"
    rm -rf "${out:?}/$folder"
    mkdir -p "$out/$folder"
    for program in "${programs[@]}"; do
        install -s -m 755 "$target/$triple/release/$program" "$out/$folder/"
    done
    cp -r packaging/{config.yaml,default,systemd,sysusers.d} README.md CHANGELOG.md LICENSE target/manual "$out/$folder/"
    cp packaging/README.md "$out/$folder/PACKAGING.md"
    tar -C "$out" --owner=0 --group=0 --sort=name -czf "$out/$folder.tar.gz" "$folder"
    rm -rf "${out:?}/$folder"
    echo "$out/$folder.tar.gz"
}

for what; do "$what"; done
