/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* eth -> IPv4 (options) -> UDP | fragment */
#ifndef UDPLB_PARSE_H
#define UDPLB_PARSE_H

#define IP_OFFSET 0x1fff /* of iphdr.frag_off, as include/net/ip.h has it */
#define IP_MF 0x2000

enum parsed {
	PARSED_OTHER, /* not ours to judge */
	PARSED_DATAGRAM,
	PARSED_FIRST_FRAGMENT,
	PARSED_LATER_FRAGMENT, /* has no UDP header */
};

/* Into the packet; not valid any more after a helper that may move it. */
struct packet {
	struct ethhdr *eth;
	struct iphdr *ip;
	struct udphdr *udp;
};

/* Read as it stands: the compiler would keep a copy, zero-extended, that the verifier takes for a number. */
static __always_inline void *data_end(struct __sk_buff *skb)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(end)
		     : "r"(skb), "i"(offsetof(struct __sk_buff, data_end)));
	return end;
}

/* False where the headers are not readable: beyond the end, or beyond the skb's linear part. */
static __always_inline bool locate(struct __sk_buff *skb, struct packet *packet)
{
	void *end = data_end(skb);

	packet->eth = (void *)(long)skb->data;
	packet->ip = (void *)(packet->eth + 1);
	if ((void *)(packet->ip + 1) > end)
		return false;
	packet->udp = (void *)packet->ip + packet->ip->ihl * 4;
	return (void *)(packet->udp + 1) <= end;
}

/* GRO leaves no more in the linear part than it looked at. */
static __always_inline bool pull_headers(struct __sk_buff *skb)
{
	const __u32 most = sizeof(struct ethhdr) + 60 + sizeof(struct udphdr);

	return !bpf_skb_pull_data(skb, skb->len < most ? skb->len : most);
}

static __always_inline bool is_udp(const struct ethhdr *eth, const struct iphdr *ip)
{
	return eth->h_proto == bpf_htons(ETH_P_IP) && ip->protocol == IPPROTO_UDP && ip->version == 4 &&
	       ip->ihl >= 5;
}

/* One too short for the UDP header that locate() looks for, and that it does not have. */
static __always_inline bool is_short_later_fragment(struct __sk_buff *skb)
{
	struct ethhdr *eth = (void *)(long)skb->data;
	struct iphdr *ip = (void *)(eth + 1);

	return (void *)(ip + 1) <= data_end(skb) && is_udp(eth, ip) && ip->frag_off & bpf_htons(IP_OFFSET);
}

static __always_inline enum parsed parse(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr *ip;

	if (!locate(skb, packet) && (!pull_headers(skb) || !locate(skb, packet)))
		return is_short_later_fragment(skb) ? PARSED_LATER_FRAGMENT : PARSED_OTHER;
	ip = packet->ip;
	if (!is_udp(packet->eth, ip))
		return PARSED_OTHER;
	if (ip->frag_off & bpf_htons(IP_OFFSET))
		return PARSED_LATER_FRAGMENT;
	return ip->frag_off & bpf_htons(IP_MF) ? PARSED_FIRST_FRAGMENT : PARSED_DATAGRAM;
}

/* The lengths agree with each other and with the frame, as net/ipv4/ip_input.c and udp.c ask for. */
static __always_inline bool well_formed(struct __sk_buff *skb, const struct packet *packet)
{
	__u32 ip_length = bpf_ntohs(packet->ip->tot_len), udp_length = bpf_ntohs(packet->udp->len);

	return sizeof(struct ethhdr) + ip_length <= skb->len && udp_length >= sizeof(struct udphdr) &&
	       packet->ip->ihl * 4 + udp_length <= ip_length;
}

#endif
