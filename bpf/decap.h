/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Takes outer headers off packets that other hosts have put into them for this one, as tunnel.h does. The
 * inner packet goes up the stack; rules do not see it, since its balancer has applied them.
 */
#ifndef UDPLB_DECAP_H
#define UDPLB_DECAP_H

#define ECN_MASK 3 /* of the TOS or traffic class */
#define ECN_CE 3

/* Outer headers of a packet, and what its inner packet is, as far as decap() has read them. */
struct outer {
	struct sender_key sender;
	struct key_address destination;
	__u32 length; /* of the headers in bytes */
	__u32 room;   /* behind them, in bytes */
	__u8 ecn;
	__u8 protocol; /* behind the IP header */
	bool is_valid; /* lengths and checksum agree */
	__u32 udp;     /* offset of the inner UDP header in the inner packet; 0: none */
};

/* Returns true for a packet that decap() has to look at, behind a link-layer header of `l2` bytes. */
static __always_inline bool may_have_outer(struct __sk_buff *skb, const __u32 l2)
{
	const struct ipv6hdr *ip6 = (void *)(long)skb->data + l2;
	const struct iphdr *ip = (void *)ip6;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return (void *)(ip + 1) > data_end(skb) || ip->protocol == IPPROTO_IPIP ||
		       ip->protocol == IPPROTO_UDP;
	return skb->protocol == bpf_htons(ETH_P_IPV6) &&
	       ((void *)(ip6 + 1) > data_end(skb) || ip6->nexthdr == IPPROTO_IPV6 ||
		ip6->nexthdr == IPPROTO_UDP);
}

/* Reads an outer IPv4 header. Returns false if it has options, or is that of a fragment. */
static __always_inline bool read_outer4(struct __sk_buff *skb, __u32 at, struct outer *outer)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || *(const __u8 *)&ip != 0x45 ||
	    ip.frag_off & bpf_htons(IP_OFFSET | IP_MF))
		return false;
	outer->sender.senders = decap_settings.senders;
	outer->sender.address[0] = ip.saddr;
	outer->destination.words[0] = ip.daddr;
	outer->length = sizeof(ip);
	outer->room = bpf_ntohs(ip.tot_len);
	outer->ecn = ip.tos & ECN_MASK;
	outer->protocol = ip.protocol;
	outer->is_valid = is_ipv4_checksum_valid(&ip, 0);
	return true;
}

/* Reads an outer IPv6 header. */
static __always_inline bool read_outer6(struct __sk_buff *skb, __u32 at, struct outer *outer)
{
	struct ipv6hdr ip6;

	if (bpf_skb_load_bytes(skb, at, &ip6, sizeof(ip6)) || ip6.version != 6)
		return false;
	outer->sender.senders = decap_settings.senders6;
	copy_address(outer->sender.address, &ip6.saddr, true);
	copy_address(outer->destination.words, &ip6.daddr, true);
	outer->length = sizeof(ip6);
	outer->room = sizeof(ip6) + bpf_ntohs(ip6.payload_len);
	outer->ecn = bpf_ntohl(*(const __be32 *)&ip6) >> 20 & ECN_MASK;
	outer->protocol = ip6.nexthdr;
	outer->is_valid = true;
	return true;
}

/*
 * Adds the UDP header of GUE to the outer headers, if there is one. Its checksum is not verified: that of the
 * inner packet is, and over IPv6 there may be none (RFC 6935). Returns false for another tunnel or none.
 */
static __always_inline bool read_outer_udp(struct __sk_buff *skb, __u32 at, struct outer *outer, bool ipv6)
{
	struct udphdr udp;

	if (outer->protocol == (ipv6 ? IPPROTO_IPV6 : IPPROTO_IPIP))
		return decap_settings.ipip;
	/* may_have_outer() has not seen the protocol of a header that was not linear */
	if (outer->protocol != IPPROTO_UDP)
		return false;
	if (!decap_settings.gue || bpf_skb_load_bytes(skb, at + outer->length, &udp, sizeof(udp)) ||
	    udp.dest != bpf_htons(GUE_PORT))
		return false;
	if (bpf_ntohs(udp.len) != outer->room - outer->length)
		outer->is_valid = false;
	outer->length += sizeof(udp);
	return true;
}

/* Returns true for outer headers from one of the senders to an address of this host. */
static __always_inline bool is_trusted(const struct outer *outer)
{
	return is_own_address(outer->destination.words) && bpf_map_lookup_elem(&senders, &outer->sender);
}

/* Returns true if an inner packet of this length, with this ECN field, is whole and can take the outer one.
 */
static __always_inline bool fits_into(const struct outer *outer, __u32 length, __u32 ecn)
{
	/* a mark of congestion on a packet that does not know of it ends the packet (RFC 6040) */
	return length <= outer->room && (outer->ecn != ECN_CE || ecn);
}

/* Reads the inner header of IPv4. Returns false if the packet is none, or not whole. */
static __always_inline bool read_inner4(struct __sk_buff *skb, __u32 at, struct outer *outer)
{
	struct iphdr ip;
	__u32 length;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return false;
	length = bpf_ntohs(ip.tot_len);
	if (ip.protocol == IPPROTO_UDP && !(ip.frag_off & bpf_htons(IP_OFFSET)))
		outer->udp = ip.ihl * 4;
	return length >= ip.ihl * 4 && fits_into(outer, length, ip.tos & ECN_MASK);
}

/* Reads the inner header of IPv6, as read_inner4(). */
static __always_inline bool read_inner6(struct __sk_buff *skb, __u32 at, struct outer *outer)
{
	struct ipv6hdr ip6;

	if (bpf_skb_load_bytes(skb, at, &ip6, sizeof(ip6)) || ip6.version != 6)
		return false;
	if (ip6.nexthdr == IPPROTO_UDP)
		outer->udp = sizeof(ip6);
	return fits_into(outer, sizeof(ip6) + bpf_ntohs(ip6.payload_len),
			 bpf_ntohl(*(const __be32 *)&ip6) >> 20 & ECN_MASK);
}

/* Takes the outer headers off. Returns false if the kernel refused it; the packet is unchanged then. */
static __always_inline bool strip(struct __sk_buff *skb, const struct outer *outer)
{
	/* without FIXED_GSO the kernel refuses GSO packets */
	if (bpf_skb_adjust_room(skb, -(__s32)outer->length, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return false;
	if (outer->ecn == ECN_CE)
		bpf_skb_ecn_set_ce(skb);
	return true;
}

/*
 * Takes the outer headers off a packet behind a link-layer header of `l2` bytes, if it has come to this host
 * from one of the senders. Returns false for a packet that stays as it is; one that contradicts itself is
 * counted.
 */
__noinline __u32 decap(struct __sk_buff *skb, __u32 l2)
{
	struct outer outer = {.sender.bits = 8 * (sizeof(outer.sender) - sizeof(outer.sender.bits))};
	bool ipv6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	__u32 verdict = NOTE_DECAPSULATED, at;

	if (!EXTRA(decap) || !is_for_us_tagged(skb, 0) ||
	    !(ipv6 ? read_outer6(skb, l2, &outer) : read_outer4(skb, l2, &outer)) ||
	    !read_outer_udp(skb, l2, &outer, ipv6) || !is_trusted(&outer))
		return false;
	at = l2 + outer.length;
	if (!outer.is_valid || outer.room < outer.length || l2 + outer.room > skb->len) {
		verdict = VERDICT_MALFORMED;
	} else {
		outer.room -= outer.length;
		if (!(ipv6 ? read_inner6(skb, at, &outer) : read_inner4(skb, at, &outer)))
			verdict = VERDICT_MALFORMED;
		else if (!strip(skb, &outer))
			verdict = VERDICT_CLONE_FAILED;
	}
	count_verdict(skb, PKT_UNKNOWN, 0, 0, verdict);
	if (verdict != NOTE_DECAPSULATED)
		return false;
	trace_decapsulated(skb, l2, outer.udp ? l2 + outer.udp : 0, ipv6);
	return true;
}

#endif
