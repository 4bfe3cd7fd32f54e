/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Recognises datagrams of NetFlow 9 (RFC 3954) and IPFIX (RFC 7011) that define templates, without which a
 * collector cannot decode flows.
 */
#ifndef UDPLB_TEMPLATES_H
#define UDPLB_TEMPLATES_H

#define NETFLOW9_VERSION 9
#define NETFLOW9_HEADER 20
#define NETFLOW9_TEMPLATES 0 /* id of a set of templates; that of options templates is the next one */
#define IPFIX_VERSION 10
#define IPFIX_HEADER 16
#define IPFIX_TEMPLATES 2
#define MAX_SETS 8	/* of a datagram that are looked at */
#define MAX_SEGMENTS 64 /* of a GSO packet: UDP_MAX_SEGMENTS */

/* Beginning of the header of a message, or of a set of records, which NetFlow calls a FlowSet. */
struct export_header {
	__be16 id;     /* of a message: its version */
	__be16 length; /* in bytes, with this header; of a message: with IPFIX alone */
};

#define MAX_DIRECT 0x3fff /* offset from which bytes are loaded by a helper */

/* Reads a header at an offset of the frame. Returns false if the frame ends before. */
static __always_inline bool read_header(struct __sk_buff *skb, __u32 offset, struct export_header *header)
{
	const struct export_header *direct;

	barrier_var(offset); /* else the verifier does not see the bound of what is added */
	if (offset > MAX_DIRECT)
		return !bpf_skb_load_bytes(skb, offset, header, sizeof(*header));
	direct = (void *)(long)skb->data + offset;
	if ((void *)(direct + 1) > data_end(skb))
		return !bpf_skb_load_bytes(skb, offset, header, sizeof(*header));
	*header = *direct;
	return true;
}

/*
 * Returns true if one of the first sets of the datagram whose payload is at `offset` of the frame has
 * templates; `length` is that of the payload, which in a first fragment is longer than what there is. A set
 * that ends behind its message ends the search, and so does what is no message.
 */
__noinline __u32 has_template_set(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	__u32 end = offset + length, templates = IPFIX_TEMPLATES, i;
	struct export_header header;

	if (!read_header(skb, offset, &header))
		return false;
	if (header.id == bpf_htons(NETFLOW9_VERSION)) {
		templates = NETFLOW9_TEMPLATES;
		offset += NETFLOW9_HEADER;
	} else if (header.id == bpf_htons(IPFIX_VERSION) && bpf_ntohs(header.length) <= length) {
		end = offset + bpf_ntohs(header.length);
		offset += IPFIX_HEADER;
	} else {
		return false;
	}
	for (i = 0; i < MAX_SETS && offset + sizeof(header) <= end; i++) {
		if (!read_header(skb, offset, &header))
			return false;
		offset += bpf_ntohs(header.length);
		if (bpf_ntohs(header.length) < sizeof(header) || offset > end)
			return false;
		if ((bpf_ntohs(header.id) & ~1) == templates)
			return true;
	}
	return false;
}

/*
 * Returns true if a datagram has templates, a GSO packet if one of its datagrams does; `udp_length` is the
 * length in the UDP header.
 */
__noinline __u32 has_templates(struct __sk_buff *skb, __u32 packed, __u32 udp_length)
{
	const struct pkt pkt = pkt_of(packed);
	__u32 offset = pkt_l4_offset(&pkt) + sizeof(struct udphdr), size = skb->gso_size, left, i;

	if (udp_length < sizeof(struct udphdr))
		return false;
	left = udp_length - sizeof(struct udphdr);
	if (!size || size > left)
		size = left;
	for (i = 0; i < MAX_SEGMENTS && left; i++) {
		if (has_template_set(skb, offset, size))
			return true;
		offset += size;
		left -= size;
		if (size > left)
			size = left;
	}
	return false;
}

#endif
