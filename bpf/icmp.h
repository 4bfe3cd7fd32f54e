/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Makes of a packet that cannot go on the error that its sender is to get (RFC 792, 1191, 1812; 4443). */
#ifndef UDPLB_ICMP_H
#define UDPLB_ICMP_H

/* linux/icmp.h and icmpv6.h want the headers of C. */
#define ICMP_DEST_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMP_TIME_EXCEEDED 11
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_TIME_EXCEED 3

struct icmp {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 mtu; /* 0: there is none to tell */
};

#define ERRORS_PER_SECOND 1000
#define ERRORS_AT_ONCE 50

#define QUOTED_IPV4 (576 - 20 - 8)  /* RFC 1812, section 4.3.2.3 */
#define QUOTED_IPV6 (1280 - 40 - 8) /* RFC 4443, section 2.4 */
#define HOPS 64

/* As long as there are tokens, that drip in evenly. */
static __always_inline bool may_send_error(void)
{
	const __u32 only = 0;
	struct budget *bucket = bpf_map_lookup_elem(&budget, &only);
	__u64 now = bpf_jiffies64(), since;
	bool may;

	if (features.asking || !bucket)
		return features.asking;
	bpf_spin_lock(&bucket->lock);
	/* another CPU may have come in between, with a later time */
	since = now > bucket->filled ? now - bucket->filled : 0;
	if (since >= features.ticks_per_second) {
		bucket->tokens = ERRORS_AT_ONCE;
		bucket->filled = now;
	} else if (since) {
		bucket->tokens += since * ERRORS_PER_SECOND / features.ticks_per_second;
		if (bucket->tokens > ERRORS_AT_ONCE)
			bucket->tokens = ERRORS_AT_ONCE;
		bucket->filled = now;
	}
	may = bucket->tokens > 0;
	if (may)
		bucket->tokens--;
	bpf_spin_unlock(&bucket->lock);
	return may;
}

/* A host that can be told (RFC 1122, section 3.2.2). */
static __always_inline bool is_unicast_ipv4(__be32 address)
{
	__u8 first = bpf_ntohl(address) >> 24;

	return first != 0 && first != 127 && first < 224;
}

/* Of a header on the stack. */
static __always_inline __u64 sum_words(const void *header, const __u32 length)
{
	__u32 i, word;
	__u64 sum = 0;

#pragma unroll
	for (i = 0; i < length / sizeof(word); i++) {
		__builtin_memcpy(&word, header + i * sizeof(word), sizeof(word));
		sum += word;
	}
	return sum;
}

/* The sum of what is quoted. Where the device fills a checksum in, it ends up as if all from there were
 * ~`partial`. */
static __always_inline __u64 sum_of(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	__u64 sum = 0;
	__u32 i, word;

	for (i = 0; i < QUOTED_IPV6 / sizeof(word); i++) {
		if (i * sizeof(word) >= length ||
		    bpf_skb_load_bytes(skb, offset + i * sizeof(word), &word, sizeof(word)))
			break;
		sum += word;
	}
	return sum;
}

/* The quotation's, as it will be read; `headers` is the length of what is before UDP. */
static __always_inline __u64 sum_of_quotation(struct __sk_buff *skb, __u32 layout, __u32 offset, __u32 length)
{
	__u32 headers = (layout & LAYOUT_UDP) - sizeof(struct ethhdr);
	__u16 pseudo;

	if (checksum_of(skb, layout) != CHECKSUM_BY_DEVICE)
		return sum_of(skb, offset, length);
	/* the device will make everything from the UDP header on sum up to the complement of this */
	if (bpf_skb_load_bytes(skb, offset + headers + offsetof(struct udphdr, check), &pseudo,
			       sizeof(pseudo)))
		return 0;
	return sum_of(skb, offset, headers) + (__u16)~pseudo;
}

static __always_inline void swap_macs(struct __sk_buff *skb)
{
	struct ethhdr *eth = (void *)(long)skb->data;
	__u8 macs[2 * ETH_ALEN] __attribute__((aligned(8)));

	if ((void *)(eth + 1) > data_end(skb))
		return;
	copy_mac(macs, eth->h_source);
	copy_mac(macs + ETH_ALEN, eth->h_dest);
	copy_macs(eth, macs);
}

struct error4 {
	struct iphdr ip;
	struct icmp icmp;
};

/* True where the packet has become the error. */
static __always_inline bool make_error4(struct __sk_buff *skb, __u32 layout, bool too_big, __u32 mtu)
{
	const __u32 ip_offset = sizeof(struct ethhdr);
	struct packet packet;
	struct error4 error = {};
	__u32 length;
	__u64 sum;

	if (!locate(skb, layout, &packet) || !is_unicast_ipv4(packet.ip->saddr) ||
	    (too_big && !(packet.ip->frag_off & bpf_htons(IP_DF))))
		return false;
	length = bpf_ntohs(packet.ip->tot_len);
	length = (length < QUOTED_IPV4 ? length : QUOTED_IPV4) & ~3;
	error.ip.version = 4;
	error.ip.ihl = 5;
	error.ip.tos = 0xc0; /* internetwork control */
	error.ip.tot_len = bpf_htons(sizeof(error) + length);
	error.ip.frag_off = bpf_htons(IP_DF);
	error.ip.ttl = HOPS;
	error.ip.protocol = IPPROTO_ICMP;
	error.ip.saddr = packet.ip->daddr;
	error.ip.daddr = packet.ip->saddr;
	error.icmp.type = too_big ? ICMP_DEST_UNREACH : ICMP_TIME_EXCEEDED;
	error.icmp.code = too_big ? ICMP_FRAG_NEEDED : 0;
	error.icmp.mtu = bpf_htonl(mtu); /* RFC 1191 has two bytes for it, behind two that are zero */
	if (bpf_skb_change_tail(skb, ip_offset + length, 0))
		return false;
	sum = sum_of_quotation(skb, layout, ip_offset, length) + sum_words(&error.icmp, sizeof(error.icmp));
	error.icmp.checksum = ~fold16(sum);
	error.ip.check = ~fold16(sum_words(&error.ip, sizeof(error.ip)));
	return !bpf_skb_adjust_room(skb, sizeof(error), BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ip_offset, &error, sizeof(error), BPF_F_RECOMPUTE_CSUM);
}

struct error6 {
	struct ipv6hdr ip6;
	struct icmp icmp;
};

static __always_inline bool make_error6(struct __sk_buff *skb, __u32 layout, bool too_big, __u32 mtu)
{
	const __u32 ip_offset = sizeof(struct ethhdr);
	struct error6 error = {};
	struct packet packet;
	__u32 length;
	__u64 sum;

	if (!locate(skb, layout, &packet) || !is_unicast_ipv6(packet.ip6->saddr.in6_u.u6_addr32))
		return false;
	length = sizeof(struct ipv6hdr) + bpf_ntohs(packet.ip6->payload_len);
	length = (length < QUOTED_IPV6 ? length : QUOTED_IPV6) & ~3;
	error.ip6.version = 6;
	error.ip6.payload_len = bpf_htons(sizeof(error.icmp) + length);
	error.ip6.nexthdr = IPPROTO_ICMPV6;
	error.ip6.hop_limit = HOPS;
	error.ip6.saddr = packet.ip6->daddr;
	error.ip6.daddr = packet.ip6->saddr;
	error.icmp.type = too_big ? ICMPV6_PKT_TOOBIG : ICMPV6_TIME_EXCEED;
	error.icmp.mtu = bpf_htonl(mtu);
	if (bpf_skb_change_tail(skb, ip_offset + length, 0))
		return false;
	/* the pseudo-header counts too */
	sum = sum_of_quotation(skb, layout, ip_offset, length) + sum_words(&error.icmp, sizeof(error.icmp)) +
	      sum_words(&error.ip6.saddr, 2 * sizeof(error.ip6.saddr)) + error.ip6.payload_len +
	      bpf_htons(IPPROTO_ICMPV6);
	error.icmp.checksum = ~fold16(sum);
	return !bpf_skb_adjust_room(skb, sizeof(error), BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ip_offset, &error, sizeof(error), BPF_F_RECOMPUTE_CSUM);
}

/*
 * Makes of a packet, which is lost in any case, the error that goes back the way it came: that it
 * did not fit `mtu`, or with 0 that it has come too far. True where it is to be sent.
 */
__noinline __u32 make_error(struct __sk_buff *skb, __u32 layout, __u32 mtu)
{
	if (!may_send_error())
		return false;
	if (features.ipv6 && layout & LAYOUT_IPV6) {
		if (!make_error6(skb, layout, mtu, mtu))
			return false;
	} else if (!make_error4(skb, layout, mtu, mtu)) {
		return false;
	}
	swap_macs(skb);
	return true;
}

#endif
