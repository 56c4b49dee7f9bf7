#!/usr/bin/env bash
# build.sh [deb] [tarball]: what is handed out, in target/packages; both without arguments.
#
#   deb      a Debian package of the release build, for this machine's architecture and at
#            least its glibc
#   tarball  statically linked programs (musl), for any Linux of this architecture, with what
#            belongs to them
#
# Run it as whoever builds. cargo-deb is installed below target/ when it is missing, Rust's musl target with rustup;
# musl-gcc comes with Debian's musl-tools. MESHD_BUILD_FLAGS are handed to `cargo build`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' packaging/build.sh; exit 0 ;; esac
for what; do
    case $what in deb | tarball) ;; *) echo "usage: packaging/build.sh [deb] [tarball]" >&2; exit 2 ;; esac
done
[ $# -gt 0 ] || set -- deb tarball

target=${CARGO_TARGET_DIR:-target}
out=$target/packages
musl=$(uname -m)-unknown-linux-musl
programs=(meshd meshctl mesh-sidecar)
read -ra flags <<<"${MESHD_BUILD_FLAGS:-}"
mkdir -p "$out"

manual() { # FOLDER of the programs: man pages and completions, which they write themselves
    rm -rf target/manual
    for program in "${programs[@]}"; do "$1/$program" manual target/manual; done
}

# The licences of what is linked in: each text once, below the packages that it came with.
licences() { # RUST TARGET
    local sources=${CARGO_HOME:-$HOME/.cargo}/registry/src package version licence file files sum sums=()
    local -A text=() of=()
    echo "meshd contains the following packages. Their licences, as their authors state them, and the texts that came with them:"
    echo
    while IFS='|' read -r package licence; do
        version=${package#* v}
        package=${package%% *}
        [ "$package" != meshd ] || continue
        printf '  %s %s: %s\n' "$package" "${version%% *}" "$licence"
        files=$(find "$sources"/*/"$package-${version%% *}" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' -o \
            -iname 'notice*' -o -iname 'copyright*' \) 2>/dev/null | sort) || true
        [ -n "$files" ] || echo "build.sh: $package comes without a licence text; what it states is listed" >&2
        while read -r file; do
            [ -n "$file" ] || continue
            sum=$(tr -d ' \t\r\n' <"$file" | sha256sum)
            [ -n "${text[$sum]:-}" ] || { text[$sum]=$file; sums+=("$sum"); }
            of[$sum]+=" $package"
        done <<<"$files"
    done < <(cargo tree --locked --edges normal --target "$1" --prefix none --format '{p}|{l}' | sed 's/ (\*)$//' | sort -u)
    printf '\n  the Rust standard library: MIT OR Apache-2.0\n'
    case $1 in *-musl) printf '  musl libc (c) 2005-2020 Rich Felker, et al.: MIT\n' ;; esac
    for sum in "${sums[@]}"; do
        printf '\n%s\n%s:%s\n\n' "$(printf '=%.0s' {1..80})" "$(basename "${text[$sum]}")" "${of[$sum]}"
        cat "${text[$sum]}"
    done
}

deb() {
    PATH=$PATH:$PWD/target/tools/bin
    command -v cargo-deb >/dev/null || cargo install --locked --root target/tools cargo-deb
    cargo build --locked --release --bins "${flags[@]}"
    manual "$target/release"
    licences "$(rustc -vV | sed -n 's/^host: //p')" >target/manual/THIRD-PARTY
    gzip -9n <CHANGELOG.md >target/manual/changelog.gz
    # what Debian's policy asks for beside it
    cat >target/manual/changelog.Debian <<EOF
meshd ($("$target/release/meshd" --version | cut -d' ' -f2)-1) unstable; urgency=medium

  * What changed is in changelog.gz.

 -- The meshd contributors <meshd@invalid>  $(LC_ALL=C date -uR -d "@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}")
EOF
    cargo deb --no-build --no-dbgsym --strip --output "$out/"
}

tarball() {
    local version name tree
    command -v musl-gcc >/dev/null || { echo "build.sh: musl-gcc is missing: apt-get install musl-tools" >&2; exit 1; }
    ! command -v rustup >/dev/null || rustup --quiet target add "$musl"
    cargo build --locked --release --bins --target "$musl" "${flags[@]}"
    manual "$target/$musl/release"
    version=$("$target/$musl/release/meshd" --version | cut -d' ' -f2)
    name=meshd-$version-$(uname -m)-linux-musl
    tree=$target/tarball/$name
    rm -rf "$target/tarball"
    # as below /usr/local, and `etc` as below /
    install -d "$tree"/{bin,etc/meshd,etc/default}
    install -d "$tree"/lib/{systemd/system,sysusers.d}
    install -d "$tree"/share/{doc/meshd,man/man1,bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
    for program in "${programs[@]}"; do
        strip -o "$tree/bin/$program" "$target/$musl/release/$program"
        ! ldd "$tree/bin/$program" 2>&1 | grep -q '=>' || { echo "build.sh: $program is not static" >&2; exit 1; }
    done
    sed 's|/usr/bin/meshd|/usr/local/bin/meshd|' packaging/systemd/meshd.service >"$tree/lib/systemd/system/meshd.service"
    cp packaging/sysusers.d/meshd.conf "$tree/lib/sysusers.d/"
    cp packaging/default "$tree/etc/default/meshd"
    install -m 600 packaging/config.yaml "$tree/etc/meshd/config.yaml"
    cp target/manual/*.1 "$tree/share/man/man1/"
    for program in "${programs[@]}"; do
        cp "target/manual/$program.bash" "$tree/share/bash-completion/completions/$program"
    done
    cp target/manual/_mesh* "$tree/share/zsh/site-functions/"
    cp target/manual/*.fish "$tree/share/fish/vendor_completions.d/"
    cp README.md CHANGELOG.md LICENSE "$tree/share/doc/meshd/"
    licences "$musl" >"$tree/share/doc/meshd/THIRD-PARTY"
    cp packaging/INSTALL "$tree/"
    chmod -R u=rwX,go=rX "$tree" && chmod 600 "$tree/etc/meshd/config.yaml"
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}" \
        -C "$target/tarball" -c "$name" | gzip -9n >"$out/$name.tar.gz"
    rm -rf "$target/tarball"
    echo "$out/$name.tar.gz"
}

for what; do "$what"; done
