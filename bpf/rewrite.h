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

static __always_inline enum checksum checksum_of(struct __sk_buff *skb, const struct packet *packet)
{
	__u32 start;

	switch (SKB_BITFIELD(skb, ip_summed)) {
	case CHECKSUM_COMPLETE:
		return CHECKSUM_OF_FRAME;
	case CHECKSUM_PARTIAL:
		/* a tunnelled packet's checksum may be the one that the device is to fill in */
		start = SKB_FIELD(skb, data) - SKB_FIELD(skb, head) + sizeof(struct ethhdr) +
			packet->ip->ihl * 4;
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

/*
 * Addresses the packet to `destination`, from `source`, with a TTL one lower; `port` 0 keeps
 * the port. Returns what this adds to skb->csum.
 */
static __always_inline __u32 rewrite(const struct packet *packet, enum checksum checksum, __be32 source,
				     __be32 destination, __be16 port)
{
	struct iphdr *ip = packet->ip;
	struct udphdr *udp = packet->udp;
	__u64 addresses = REPLACED(__u32, ip->saddr, source) + REPLACED(__u32, ip->daddr, destination);
	__u64 hop = REPLACED(__u16, bpf_htons(ip->ttl << 8), bpf_htons((ip->ttl - 1) << 8));
	__u64 ports = port ? REPLACED(__u16, udp->dest, port) : 0;
	__u16 ip_check = ip->check, udp_check = udp->check;

	ip->saddr = source;
	ip->daddr = destination;
	ip->ttl--;
	ip->check = ~fold16((__u16)~ip_check + addresses + hop);
	if (port)
		udp->dest = port;
	if (checksum == CHECKSUM_BY_DEVICE)
		udp->check = fold16(udp_check + addresses);
	else if (udp_check)
		udp->check = (__u16)~fold16((__u16)~udp_check + addresses + ports) ?: 0xffff;
	if (checksum != CHECKSUM_OF_FRAME)
		return 0;
	return fold32(addresses + hop + ports + REPLACED(__u16, ip_check, ip->check) +
		      REPLACED(__u16, udp_check, udp->check));
}

/* The headers as they came; only the fixed parts ever change. */
struct headers {
	struct ethhdr eth;
	__u16 unused;
	struct iphdr ip;
	struct udphdr udp;
};
SIZE_IS(struct headers, 44);

/* By the widest words that the verifier takes; a copy of the packed struct would go byte by byte. */
static __always_inline void copy_eth(void *to, const void *from)
{
	*(__u64 *)to = *(const __u64 *)from;
	*(__u32 *)(to + 8) = *(const __u32 *)(from + 8);
}

static __always_inline void save(const struct packet *packet, struct headers *headers)
{
	copy_eth(&headers->eth, packet->eth);
	headers->ip = *packet->ip;
	headers->udp = *packet->udp;
}

static __always_inline void restore(const struct packet *packet, const struct headers *headers)
{
	copy_eth(packet->eth, &headers->eth);
	*packet->ip = headers->ip;
	*packet->udp = headers->udp;
}

#endif
