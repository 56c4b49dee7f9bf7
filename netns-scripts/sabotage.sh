#!/usr/bin/env bash
# sabotage.sh [NUMBER…]: shows that broken builds turn red. Each small sabotage is applied
# alone to a copy of the committed tree, and the tests that need no root must catch it.
# Prints which did; exit code 0 only if all are caught (and none fails to apply).
#
# The copy and its build directory lie in target/sabotage, so that a second run is short.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
for n; do case $n in *[!0-9]*) echo "usage: sabotage.sh [NUMBER…]" >&2; exit 2 ;; esac; done

lab_begin
need git:git
need_cargo
COPY=$TARGET/sabotage/tree
LOCK=${SABOTAGE_LOCK:-} # a command to run cargo under, such as "flock FILE"
# stories beside the unit tests
STORIES=()
for t in sim corpus zero_alloc architecture interleavings; do
    [ ! -e "$ROOT/tests/$t.rs" ] && [ ! -d "$ROOT/tests/$t" ] || STORIES+=(--test "$t")
done

# FILE | WHAT IT IS | what is there (once in the file, as it stands) | what comes instead
SABOTAGES=(
    "src/engine/inbound.rs|no check of the outer source|let peer = member.ok_or(Drop::UnknownSource)?;|let peer = member.unwrap_or(PeerIndex(0));"
    "src/engine/inbound.rs|no check of the inner source|if !tables.may_send(peer, packet.source) {|if false {"
    "src/engine/inbound.rs|no check of the inner destination|if !tables.is_behind_us(packet.destination) {|if false {"
    "src/engine/inbound.rs|a wrong VNI is accepted|if vxlan.vni() != local.vni.get() {|if false {"
    "src/engine/inbound.rs|no I flag is accepted|if vxlan.flags & vxlan::FLAG_I == 0 {|if false {"
    "src/engine/inbound.rs|a frame for another VTEP is accepted|ethernet.destination != local.mac.0 \&\& ethernet.destination != [0xff; 6]|false"
    "src/engine/inbound.rs|outer ECN is ignored|(ECT0 \| ECT1, CE) => CE,|(ECT0 \| ECT1, CE) => inner_tos \& 3,"
    "src/engine/inbound.rs|a datagram is counted twice|stats.flow.udp_rx_packets.add(datagrams);|stats.flow.udp_rx_packets.add(datagrams * 2);"
    "src/engine/inbound.rs|a drop is not counted|Err(reason) => self.drop(reason),|Err(_) => {}"
    "src/engine/inbound.rs|the last short datagram of a buffer is lost|let (at, size) = (at + offset, step.min(len - offset));|let (at, size) = (at + offset, step); if offset + size > len { break; }"
    "src/engine/coalesce.rs|joins across a gap|(udp \|\| segment.sequence == first.sequence.wrapping_add(self.payload as u32))|true"
    "src/engine/coalesce.rs|PSH does not end a super-packet|self.flags \& (flags::PSH \| flags::FIN) != 0|self.flags \& flags::FIN != 0"
    "src/engine/coalesce.rs|joins without a look at the checksum|if checksum != self.checksum \|\| checksum == Checksum::Wrong {|if false {"
    "src/engine/coalesce.rs|ids do not matter|follows.then_some(Id { last: id, fixed })|(follows \|\| true).then_some(Id { last: id, fixed })"
    "src/engine/coalesce.rs|a short segment does not end a super-packet|self.closed = segment.payload < first.payload \|\| segment.ends();|self.closed = segment.ends();"
    "src/engine/coalesce.rs|differing TTL and TOS are joined|\&\& same_ip(packet, head, bytes)|"
    "src/engine/coalesce.rs|differing urgent pointers are joined|\&\& a_tcp.urgent == b_tcp.urgent|"
    "src/engine/coalesce.rs|joins what came before a super-packet|self.next_is_last_of(classify::flow_hash(packet, classify::ports(packet, bytes)));
        let takes|let takes"
    "src/engine/segment.rs|a checksum may lie in the IP header|start >= usize::from(packet.header_len)|start >= ip::V4_MIN_LEN"
    "src/engine/inbound.rs|a finished datagram passes as a super-packet|coalesce::unfinished_udp(packet, bytes).then_some(size)|Some(size)"
    "src/engine/segment.rs|the id is not counted up|let id = self.id.wrapping_add(index as u16);|let id = self.id;"
    "src/engine/segment.rs|CWR on every segment|tcp_flags \&= !flags::CWR;|tcp_flags \&= 0xff;"
    "src/engine/segment.rs|FIN and PSH on every segment|tcp_flags \&= !(flags::FIN \| flags::PSH);|tcp_flags \&= 0xff;"
    "src/engine/segment.rs|off by one in the length|let total = (self.gso.header_len + payload.len()) as u16;|let total = (self.gso.header_len + payload.len() + 1) as u16;"
    "src/engine/segment.rs|a UDP checksum of zero is sent|if check == [0, 0] { [0xff, 0xff] } else { check }|check"
    "src/engine/segment.rs|an unfinished checksum is sent as it is|covered.get_mut(offset..offset + 2)?.copy_from_slice(\&check);|let _ = check;"
    "src/engine/outbound.rs|no check of the own source|if !tables.is_ours(packet.source) {|if false {"
    "src/engine/outbound.rs|no check of the MTU|if longest > usize::from(route.peer.mtu()) {|if false {"
    "src/engine/outbound.rs|a failed send counts as sent|stats.drop(reason, segments - sent);|stats.drop(reason, 0);"
    "src/engine/outbound.rs|a fragment's offset is off|(offset + (index * room / 8) as u16)|(offset + (index * room / 16) as u16)"
    "src/engine/tx_batch.rs|datagrams overtake|.rposition(\|run\| run.key == key)|.position(\|run\| run.key == key)"
    "src/engine/tables.rs|the shortest prefix wins|self.routes.get(destination)|self.routes.v4.last().zip(match destination { IpAddr::V4(ip) => Some(ip.to_bits()), IpAddr::V6(_) => None }).and_then(\|(l, ip)\| l.nets.get(\&(ip \& l.mask)).copied())"
    "src/wire/checksum.rs|an odd last byte is left out|total += u64::from(u16::from_ne_bytes([*odd, 0]));|let _ = odd;"
    "src/wire/ip.rs|a total length beyond the bytes is believed|total_len < header_len \|\| total_len > bytes.len()|total_len < header_len"
    "src/wire/ip.rs|later fragments are no fragments|\& (V4_MF \| V4_OFFSET) != 0|\& V4_MF != 0"
    "src/engine/inbound.rs|a peer may steer our routes|if classify::steers_routes(\&packet, bytes) {|if false {"
    "src/engine/outbound.rs|a workload may steer routes|if classify::steers_routes(\&packet, bytes) {|if false {"
    "src/engine/classify.rs|a fragment's payload is taken for ICMP|steers \&\& packet.protocol == protocol::ICMP \&\& is_first|steers \&\& packet.protocol == protocol::ICMP"
    "src/engine/inbound.rs|reserved bits of VXLAN are refused|if vxlan.flags \& vxlan::FLAG_I == 0 {|if vxlan.flags != vxlan::FLAG_I {"
    "src/engine/inbound.rs|an encrypted peer may send in clear|if tables.tunnel(peer).is_some_and(\|tunnel\| tunnel.policy() == Policy::Required) {|if false {"
    "src/engine/outbound.rs|an encrypted peer is sent to in clear until there is a session|.filter(\|tunnel\| tunnel.seals())|.filter(\|tunnel\| tunnel.is_up(0))"
    "src/engine/outbound.rs|what waited for a session is not counted|count_read(\&stats.flow, 1, u64::from(inner));|let _ = inner;"
    "src/engine/tunnel/locked.rs|a peer moves by what anybody may have sent again|Ok(message) => outbox.post(message.as_bytes(), if self.number == 0 { source } else { to }, socket),|Ok(message) => { let _ = to; self.heard_from(source); outbox.post(message.as_bytes(), source, socket) }"
    "src/engine/tunnel/machine.rs|a replayed initiation is answered|if stamp <= self.heard {|if false {"
    "src/engine/tunnel/machine.rs|who asked for a session does not ask for the next|now_ms >= current.born_ms + REKEY_AFTER_MS|false"
    "src/engine/tunnel/session.rs|a replayed packet is delivered|\|\| !self.window.is_new(counter)|\|\| false"
    "src/engine/tunnel/noise.rs|a preshared key does not matter|derive(\&self.chain, preshared);|derive(\&self.chain, \&[0; 32][..preshared.len()]);"
    "src/engine/tunnel/cookie.rs|a cookie is anybody's|\&ip, \&source.port().to_le_bytes()]|\&ip[..0]]"
    "src/control/known.rs|what could not be encrypted goes in clear once it can|None if !was_encrypted => self.make(endpoint, wish, Policy::Migrating),|None => self.make(endpoint, wish, Policy::Migrating),
            #[allow(unreachable_patterns)]"
    "src/io/worker.rs|the wall clock drives the engine|let now_us = started.elapsed().as_micros() as u64;
            let now_ms|let now_us = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, \|t\| t.as_micros() as u64);
            let now_ms"
    "src/control/reconcile.rs|an emptied list is not held back|Some((what, from)) if !accepted \&\& of >= GUARDED_FROM =>|Some((what, from)) if false \&\& of >= GUARDED_FROM =>"
)

copy_cargo() {
    # shellcheck disable=SC2086
    (cd "$COPY" && CARGO_TARGET_DIR=$TARGET/sabotage/build CARGO_PROFILE_DEV_DEBUG=0 SIM_WALKS=400 \
        $LOCK timeout -k 5 600 cargo "$@" -- --test-threads=2)
}
test_copy() { # what is quick comes first; the first that fails is enough
    copy_cargo test --locked --lib && copy_cargo test --locked "${STORIES[@]}"
}

step "A copy of the committed tree"
rm -rf "$COPY"
mkdir -p "$COPY" || die "no place for a copy"
# as new (-m), or cargo would take what the last sabotage of a former run left for built from it
git -C "$ROOT" archive HEAD | tar -xm -C "$COPY" || die "no copy of the tree"
busy "the tests pass as it is" test_copy || die "the suite is red without sabotage: nothing can be shown"

step "Sabotages"
number=0 caught=0 missed=0
for sabotage in "${SABOTAGES[@]}"; do
    number=$((number + 1))
    [ $# = 0 ] || [[ " $* " == *" $number "* ]] || continue
    # fields are parted by a bare |; \| and \& stand for themselves
    text=${sabotage//'\|'/$'\x01'}
    text=${text//'\&'/$'\x02'}
    file=${text%%|*} text=${text#*|}
    what=${text%%|*} text=${text#*|}
    from=${text%%|*} to=${text#*|}
    from=${from//$'\x01'/|} to=${to//$'\x01'/|}
    from=${from//$'\x02'/'&'} to=${to//$'\x02'/'&'}
    cp "$COPY/$file" "$LAB/original"
    content=$(cat "$LAB/original"; printf x)
    content=${content%x}
    if [[ $content != *"$from"* ]]; then
        printf '   %2d  %-52s %sdoes not apply%s\n' $number "$what" "$RED" "$PLAIN"
        missed=$((missed + 1))
        continue
    fi
    printf '%s%s%s' "${content%%"$from"*}" "$to" "${content#*"$from"}" >"$COPY/$file"
    background test_copy >"$LAB/out" 2>&1
    pid=$LAST
    wait "$pid"
    rc=$?
    forget "$pid"
    by=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$LAB/out" | head -n 2 | paste -sd, | cut -c1-90)
    if [ $rc = 0 ]; then
        missed=$((missed + 1))
        printf '   %2d  %-52s %sMISSED%s\n' $number "$what" "$RED" "$PLAIN"
    elif [ -n "$by" ] || [ $rc = 124 ]; then
        caught=$((caught + 1))
        printf '   %2d  %-52s caught by %s\n' $number "$what" "${by:-the time limit}"
    else
        missed=$((missed + 1))
        printf '   %2d  %-52s %sdoes not build%s: %s\n' $number "$what" "$RED" "$PLAIN" "$(grep -m1 '^error' "$LAB/out")"
    fi
    cp "$LAB/original" "$COPY/$file"
done
say
[ $missed = 0 ] || die "$caught caught, $missed not"
say "${GREEN}all $caught sabotages are caught$PLAIN"
