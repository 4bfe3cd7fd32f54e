/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Addresses, port, TTL and checksums; and the way back. */
#ifndef UDPLB_REWRITE_H
#define UDPLB_REWRITE_H

/* Of the kernel's struct, what says who computes the checksum (include/linux/skbuff.h). */
struct sk_buff {
	__u8 ip_summed : 2;
	__u16 csum_start;
	unsigned char *head;
	unsigned char *data;
} __attribute__((preserve_access_index));

#define CHECKSUM_COMPLETE 2
#define CHECKSUM_PARTIAL 3

enum checksum {
	CHECKSUM_IN_PACKET,
	CHECKSUM_BY_DEVICE, /* the field holds the sum of the pseudo-header alone */
	CHECKSUM_OF_FRAME,  /* as CHECKSUM_IN_PACKET, and skb->csum covers what is changed */
};

extern void *bpf_cast_to_kern_ctx(void *context) __ksym __weak;

/*
 * The context is the kernel's sk_buff. From 6.2 on the verifier can be told so, before that
 * the field is read like any kernel memory, which costs as much as a map lookup.
 */
#define SKB_FIELD(skb, field)                                                                                \
	(bpf_cast_to_kern_ctx ? ((struct sk_buff *)bpf_cast_to_kern_ctx(skb))->field                         \
			      : BPF_CORE_READ((struct sk_buff *)(void *)(skb), field))
#define SKB_BITFIELD(skb, field)                                                                             \
	(bpf_cast_to_kern_ctx ? BPF_CORE_READ_BITFIELD((struct sk_buff *)bpf_cast_to_kern_ctx(skb), field)   \
			      : BPF_CORE_READ_BITFIELD_PROBED((struct sk_buff *)(void *)(skb), field))

static __always_inline enum checksum checksum_of(struct __sk_buff *skb, __u32 layout)
{
	__u32 start;

	switch (SKB_BITFIELD(skb, ip_summed)) {
	case CHECKSUM_COMPLETE:
		return CHECKSUM_OF_FRAME;
	case CHECKSUM_PARTIAL:
		/* a tunnelled packet's checksum may be the one that the device is to fill in */
		start = SKB_FIELD(skb, data) - SKB_FIELD(skb, head) + (layout & LAYOUT_UDP);
		return SKB_FIELD(skb, csum_start) == start ? CHECKSUM_BY_DEVICE : CHECKSUM_IN_PACKET;
	default:
		return CHECKSUM_IN_PACKET;
	}
}

static __always_inline __u32 fold32(__u64 sum)
{
	sum = (__u32)sum + (sum >> 32);
	return (__u32)sum + (sum >> 32);
}

static __always_inline __u16 fold16(__u64 sum)
{
	__u32 folded = fold32(sum);

	folded = (folded & 0xffff) + (folded >> 16);
	return (folded & 0xffff) + (folded >> 16);
}

/* What replacing `from` by `to` adds to a sum: RFC 1624, equation 3. */
#define REPLACED(type, from, to) ((__u64)(type) ~(from) + (type)(to))

/* What a packet is to say when it leaves. */
struct label {
	__be32 source[4];
	__be32 destination[4];
	__be16 port;	      /* 0: stays */
	__u32 identification; /* of fragments; 0: stays */
};

/* The IPv4 header; returns what this adds to the sums: that of the pseudo-header, and the rest. */
static __always_inline __u64 rewrite_ipv4(struct iphdr *ip, const struct label *label, __u64 *rest)
{
	__u64 addresses = REPLACED(__u32, ip->saddr, label->source[0]) +
			  REPLACED(__u32, ip->daddr, label->destination[0]);
	__u64 others = REPLACED(__u16, bpf_htons(ip->ttl << 8), bpf_htons((ip->ttl - 1) << 8));
	__u16 check = ip->check, identification = bpf_htons(label->identification);

	ip->saddr = label->source[0];
	ip->daddr = label->destination[0];
	ip->ttl--;
	if (label->identification) {
		others += REPLACED(__u16, ip->id, identification);
		ip->id = identification;
	}
	ip->check = ~fold16((__u16)~check + addresses + others);
	*rest = others + REPLACED(__u16, check, ip->check);
	return addresses;
}

/* The same for IPv6, without its fragment header. */
static __always_inline __u64 rewrite_ipv6(struct ipv6hdr *ip6, const struct label *label, __u64 *rest)
{
	__be32 *source = ip6->saddr.in6_u.u6_addr32, *destination = ip6->daddr.in6_u.u6_addr32;
	__u64 addresses = 0;
	int word;

#pragma unroll
	for (word = 0; word < 4; word++) {
		addresses += REPLACED(__u32, source[word], label->source[word]) +
			     REPLACED(__u32, destination[word], label->destination[word]);
		source[word] = label->source[word];
		destination[word] = label->destination[word];
	}
	*rest = REPLACED(__u16, bpf_htons(ip6->hop_limit), bpf_htons(ip6->hop_limit - 1));
	ip6->hop_limit--;
	return addresses;
}

/* Of an IPv6 fragment; NULL where there is none. */
static __always_inline __be32 *identification_of(struct __sk_buff *skb, __u32 layout)
{
	__u32 offset = layout >> LAYOUT_FRAGMENT_SHIFT & LAYOUT_FRAGMENT;
	__be32 *identification;

	if (!features.ipv6 || !features.fragments || !offset)
		return NULL;
	identification = (void *)(long)skb->data + offset + 4;
	return (void *)(identification + 1) <= data_end(skb) ? identification : NULL;
}

/*
 * Puts the label on, with a TTL one lower. Returns what this adds to skb->csum.
 */
static __always_inline __u32 rewrite(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
				     enum checksum checksum, const struct label *label)
{
	struct udphdr *udp = packet->udp;
	__be32 *identification;
	__u64 addresses, rest;
	__u16 check;

	if (packet->is_ipv6)
		addresses = rewrite_ipv6(packet->ip6, label, &rest);
	else
		addresses = rewrite_ipv4(packet->ip, label, &rest);
	if (packet->is_ipv6 && label->identification && (identification = identification_of(skb, layout))) {
		rest += REPLACED(__u32, *identification, bpf_htonl(label->identification));
		*identification = bpf_htonl(label->identification);
	}
	if (packet->has_udp) {
		__u64 ports = label->port ? REPLACED(__u16, udp->dest, label->port) : 0;

		check = udp->check;
		if (label->port)
			udp->dest = label->port;
		if (checksum == CHECKSUM_BY_DEVICE)
			udp->check = fold16(check + addresses);
		else if (check)
			udp->check = (__u16)~fold16((__u16)~check + addresses + ports) ?: 0xffff;
		rest += ports + REPLACED(__u16, check, udp->check);
	}
	return checksum == CHECKSUM_OF_FRAME ? fold32(addresses + fold32(rest)) : 0;
}

/* The headers as they came; only the fixed parts ever change. */
struct headers {
	union {
		struct iphdr ip;
		struct ipv6hdr ip6;
	};
	struct udphdr udp;
	__u8 macs[2 * ETH_ALEN] __attribute__((aligned(8)));
	__be32 identification;
};

/* Both MAC addresses of a frame at once, by the widest words that the verifier takes. */
static __always_inline void copy_macs(void *to, const void *from)
{
	*(__u64 *)to = *(const __u64 *)from;
	*(__u32 *)(to + 8) = *(const __u32 *)(from + 8);
}

static __always_inline void save(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
				 struct headers *headers)
{
	const __be32 *identification = identification_of(skb, layout);

	copy_macs(headers->macs, packet->eth);
	if (packet->is_ipv6)
		headers->ip6 = *packet->ip6;
	else
		headers->ip = *packet->ip;
	if (packet->has_udp)
		headers->udp = *packet->udp;
	if (identification)
		headers->identification = *identification;
}

static __always_inline void restore(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
				    const struct headers *headers)
{
	__be32 *identification = identification_of(skb, layout);

	copy_macs(packet->eth, headers->macs);
	if (packet->is_ipv6)
		*packet->ip6 = headers->ip6;
	else
		*packet->ip = headers->ip;
	if (packet->has_udp)
		*packet->udp = headers->udp;
	if (identification)
		*identification = headers->identification;
}

#endif
