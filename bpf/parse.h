/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whole datagrams behind plain headers, and where the headers of a packet are; the rest is in aside.h. */
#ifndef UDPLB_PARSE_H
#define UDPLB_PARSE_H

#define AF_INET 2
#define AF_INET6 10

#define IP_OFFSET 0x1fff /* of iphdr.frag_off, as include/net/ip.h has it */
#define IP_MF 0x2000
#define IP_DF 0x4000

/* Next headers that may stand before UDP (RFC 8200, section 4). */
#define NEXTHDR_HOP 0
#define NEXTHDR_ROUTING 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_DEST 60

enum parsed {
	PARSED_OTHER, /* not ours to judge */
	PARSED_SHORT, /* beyond the end, or beyond the skb's linear part */
	PARSED_IPV4,
	PARSED_IPV6,
	PARSED_ASIDE, /* tags, extension headers, fragments */
};

/* Into the packet; not valid any more after a helper that may move it. */
struct packet {
	struct ethhdr *eth;
	union {
		struct iphdr *ip;
		struct ipv6hdr *ip6;
	};
	struct udphdr *udp;
	bool is_ipv6;
	bool has_udp; /* a later fragment has none */
};

/*
 * True or false, of which the compiler does not know why: it would ask the layout again, and the verifier
 * forgets what it was told of that.
 */
#define IT_IS(truth)                                                                                         \
	({                                                                                                   \
		__u64 it_is;                                                                                 \
		asm volatile("%0 = " #truth : "=r"(it_is));                                                  \
		it_is;                                                                                       \
	})

/*
 * Where the headers are behind an Ethernet header without tags, and what is to be done: in one
 * number, because functions that the kernel verifies by themselves take nothing else before 5.13.
 */
#define LAYOUT_UDP 0x3ff	 /* offset of the UDP header, or of a later fragment's data */
#define LAYOUT_FRAGMENT_SHIFT 10 /* offset of the IPv6 fragment header; 0: there is none */
#define LAYOUT_FRAGMENT 0x3ff
#define LAYOUT_IPV6 (1 << 20)
#define LAYOUT_FIRST (1 << 21)	/* a fragment */
#define LAYOUT_LATER (1 << 22)	/* a fragment without UDP header */
#define LAYOUT_GIVE (1 << 23)	/* send the packet itself, not a copy */
#define LAYOUT_TRACED (1 << 24) /* somebody wants to hear of it */
#define LAYOUT_MOST (LAYOUT_UDP + 1)

/* Read as it stands: the compiler would keep a copy, zero-extended, that the verifier takes for a number. */
static __always_inline void *data_end(struct __sk_buff *skb)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(end)
		     : "r"(skb), "i"(offsetof(struct __sk_buff, data_end)));
	return end;
}

/* False where the headers are not readable. */
static __always_inline bool locate(struct __sk_buff *skb, __u32 layout, struct packet *packet)
{
	void *end = data_end(skb);

	packet->eth = (void *)(long)skb->data;
	packet->ip = (void *)(packet->eth + 1);
	if (features.ipv6 && layout & LAYOUT_IPV6) {
		packet->is_ipv6 = IT_IS(1);
		if ((void *)(packet->ip6 + 1) > end)
			return false;
	} else {
		packet->is_ipv6 = IT_IS(0);
		if ((void *)(packet->ip + 1) > end)
			return false;
	}
	packet->has_udp = IT_IS(0);
	if (features.fragments && layout & LAYOUT_LATER)
		return true;
	packet->has_udp = IT_IS(1);
	packet->udp = (void *)packet->eth + (layout & LAYOUT_UDP);
	return (void *)(packet->udp + 1) <= end;
}

/* All that is ever changed. */
static __always_inline bool is_readable(struct __sk_buff *skb, __u32 layout)
{
	return (void *)(long)skb->data + (layout & LAYOUT_UDP) + sizeof(struct udphdr) <= data_end(skb);
}

/* Makes the first bytes readable, as many as there are. */
static __always_inline bool pull(struct __sk_buff *skb, __u32 length)
{
	return !bpf_skb_pull_data(skb, skb->len < length ? skb->len : length);
}

static __always_inline enum parsed parse_ipv4(void *end, struct packet *packet)
{
	const struct iphdr *ip = packet->ip;

	if (ip->protocol != IPPROTO_UDP || ip->version != 4 || ip->ihl < 5)
		return PARSED_OTHER;
	if (ip->frag_off & bpf_htons(IP_OFFSET | IP_MF))
		return PARSED_ASIDE;
	packet->udp = (void *)ip + ip->ihl * 4;
	return (void *)(packet->udp + 1) > end ? PARSED_SHORT : PARSED_IPV4;
}

static __always_inline bool is_extension(__u8 next)
{
	return next == NEXTHDR_HOP || next == NEXTHDR_ROUTING || next == NEXTHDR_FRAGMENT ||
	       next == NEXTHDR_DEST;
}

static __always_inline enum parsed parse_ipv6(void *end, struct packet *packet)
{
	const struct ipv6hdr *ip6 = packet->ip6;

	packet->is_ipv6 = IT_IS(1);
	if ((void *)(ip6 + 1) > end)
		return PARSED_SHORT;
	if (ip6->version != 6)
		return PARSED_OTHER;
	if (ip6->nexthdr != IPPROTO_UDP)
		return is_extension(ip6->nexthdr) ? PARSED_ASIDE : PARSED_OTHER;
	packet->udp = (void *)(ip6 + 1);
	return (void *)(packet->udp + 1) > end ? PARSED_SHORT : PARSED_IPV6;
}

static __always_inline bool is_tag(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

/* `l2` is the length of the header before the IP header: Ethernet's, or 0. */
static __always_inline enum parsed try_to_parse(struct __sk_buff *skb, const __u32 l2, struct packet *packet)
{
	void *end = data_end(skb);
	__be16 protocol = 0;

	packet->eth = (void *)(long)skb->data;
	packet->ip = (void *)packet->eth + l2;
	packet->is_ipv6 = IT_IS(0);
	packet->has_udp = true;
	if ((void *)(packet->ip + 1) > end)
		return PARSED_SHORT;
	protocol = l2 ? packet->eth->h_proto : skb->protocol;
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(end, packet);
	if (features.ipv6 && protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(end, packet);
	return l2 && is_tag(protocol) ? PARSED_ASIDE : PARSED_OTHER;
}

/* GRO leaves no more in the linear part than it looked at. */
static __always_inline enum parsed parse(struct __sk_buff *skb, const __u32 l2, struct packet *packet)
{
	enum parsed parsed = try_to_parse(skb, l2, packet);

	if (parsed == PARSED_SHORT && pull(skb, l2 + 60 + sizeof(struct udphdr)))
		parsed = try_to_parse(skb, l2, packet);
	return parsed;
}

/*
 * The lengths agree with each other and with the frame, as net/ipv4/ip_input.c, udp.c and their IPv6 twins
 * ask for; with IPv6 there is a checksum, too. Of a fragment's datagram more is to come.
 */
static __always_inline bool well_formed(struct __sk_buff *skb, __u32 layout, const struct packet *packet)
{
	__u32 length, offset = (layout & LAYOUT_UDP) - sizeof(struct ethhdr), udp_length;

	if (packet->is_ipv6)
		length = sizeof(struct ipv6hdr) + bpf_ntohs(packet->ip6->payload_len);
	else
		length = bpf_ntohs(packet->ip->tot_len);
	if (sizeof(struct ethhdr) + length > skb->len)
		return false;
	if (!packet->has_udp)
		return offset <= length;
	udp_length = bpf_ntohs(packet->udp->len);
	if (udp_length < sizeof(struct udphdr) || (packet->is_ipv6 && !packet->udp->check))
		return false;
	if (layout & LAYOUT_FIRST)
		udp_length = sizeof(struct udphdr);
	return offset + udp_length <= length;
}

#endif
