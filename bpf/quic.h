/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Selects the upstream that the connection id of a QUIC packet names, in plaintext (RFC 8999;
 * draft-ietf-quic-load-balancers). src/desired/quic.rs reads the same bytes.
 */
#ifndef UDPLB_QUIC_H
#define UDPLB_QUIC_H

#define QUIC_LONG_HEADER 0x80 /* in the first byte */

/* UDP header and beginning of a QUIC packet with a long header. */
struct quic_start {
	struct udphdr udp;
	__u8 first;
	__u8 version[4];
	__u8 cid_length; /* the destination connection id follows */
};

/* Returns the offset of the destination connection id in the payload; 0 if it is shorter than `end` bytes. */
static __always_inline __u32 connection_id(const struct quic_start *start, __u32 end)
{
	if (!(start->first & QUIC_LONG_HEADER))
		return sizeof(start->first);
	return start->cid_length >= end ? sizeof(*start) - sizeof(start->udp) : 0;
}

/*
 * Returns the index plus one of the upstream of a rule that a packet's connection id names; 0: it names none,
 * or one that is down if those are skipped. `place` is the offset of the server's id in the connection id,
 * above its length in the lower 16 bits. Any packet of QUIC is longer than what is read.
 */
__noinline __u32 find_server(struct __sk_buff *skb, __u32 packed, __u32 rule, __u32 place, __u32 skips_down)
{
	const struct pkt pkt = pkt_of(packed);
	__u32 offset = place >> 16, length = place & 0xffff, at = pkt_l4_offset(&pkt), cid;
	struct server_key key = {.rule = rule};
	const struct upstream *upstream;
	struct quic_start start;
	const __u32 *index;
	__be64 id;

	if (!EXTRA(quic) || bpf_skb_load_bytes(skb, at, &start, sizeof(start)))
		return 0;
	cid = connection_id(&start, offset + length);
	offset += sizeof(start.udp) + cid;
	if (!cid || bpf_ntohs(start.udp.len) < offset + sizeof(id) ||
	    bpf_skb_load_bytes(skb, at + offset, &id, sizeof(id)))
		return 0;
	key.server = bpf_be64_to_cpu(id) >> (8 * (MAX_SERVER_ID - length) & 63);
	index = bpf_map_lookup_elem(&servers, &key);
	upstream = index ? bpf_map_lookup_elem(&upstreams, index) : NULL;
	return upstream && !(skips_down && is_down(upstream)) ? *index + 1 : 0;
}

#endif
