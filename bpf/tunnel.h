/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Puts packets into outer headers: IP in IP (RFC 2003, RFC 2473), or GUE variant 1 (draft-ietf-intarea-gue).
 */
#ifndef UDPLB_TUNNEL_H
#define UDPLB_TUNNEL_H

#define GUE_PORT 6080
#define OUTER_TTL 64
#define GUE_SOURCE_PORT 0xc000 /* the lowest; 14 bits of a hash are added */

/* Returns the length in bytes of the outer headers of a tunnel. */
static __always_inline __u32 tunnel_length(bool gue, bool ipv6)
{
	return (ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) + (gue ? sizeof(struct udphdr) : 0);
}

/* Returns the length in bytes of the outer headers of a packet. */
static __always_inline __u32 outer_length(const struct xmit *xmit, bool ipv6)
{
	return is_tunnel(xmit) ? tunnel_length(xmit->via == VIA_GUE, ipv6) : 0;
}

/* Returns a hash of a packet's flow; the fragments of a datagram, which have no ports, have the same one. */
static __always_inline __u32 flow_hash(const struct pkt *pkt)
{
	bool whole = pkt->has_udp && !pkt_has(pkt, PKT_F_FIRST_FRAGMENT);

	return mix(fold_address(pkt) << 16 ^ (whole ? pkt->udp->source : 0));
}

/*
 * Stores the destination of a packet to the upstream at an index, and the source of its outer headers.
 * Returns false if this is not known.
 */
__noinline __u32 keep_destination(struct __sk_buff *skb, __u32 packed, __u32 index)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	const struct upstream *upstream;

	if (!EXTRA(direct) || !xmit || !pkt_locate(skb, &pkt))
		return false;
	if (pkt.is_ipv6)
		copy_address(xmit->kept, &pkt.ip6->daddr, true);
	else
		xmit->kept[0] = pkt.ip->daddr;
	upstream = bpf_map_lookup_elem(&upstreams, &index);
	return !is_tunnel(xmit) || (upstream && egress_address(upstream, xmit->egress));
}

static __always_inline void fill_outer_udp(struct udphdr *udp, __u32 hash, __u32 length)
{
	/* routers and receive queues spread flows by the source port */
	udp->source = bpf_htons(GUE_SOURCE_PORT | (hash & 0x3fff));
	udp->dest = bpf_htons(GUE_PORT);
	udp->len = bpf_htons(sizeof(*udp) + length);
}

/* Fills in the outer headers of an IPv4 packet. */
static __always_inline void fill_outer4(struct outer4 *outer, const struct pkt *pkt, bool gue, __be32 source,
					__be32 destination)
{
	__u32 length = total_length(pkt);

	__builtin_memset(outer, 0, sizeof(*outer));
	outer->ip.version = 4;
	outer->ip.ihl = 5;
	outer->ip.tos = pkt->ip->tos;
	outer->ip.tot_len = bpf_htons(tunnel_length(gue, false) + length);
	outer->ip.frag_off = bpf_htons(IP_DF);
	outer->ip.ttl = OUTER_TTL;
	outer->ip.protocol = gue ? IPPROTO_UDP : IPPROTO_IPIP;
	outer->ip.saddr = source;
	outer->ip.daddr = destination;
	outer->ip.check = ~fold16(sum_words(&outer->ip, sizeof(outer->ip)));
	fill_outer_udp(&outer->udp, flow_hash(pkt), length);
}

/* Fills in the outer headers of an IPv6 packet. */
static __always_inline void fill_outer6(struct outer6 *outer, const struct pkt *pkt, bool gue,
					const __be32 *source, const __be32 *destination)
{
	__u32 length = total_length(pkt), hash = flow_hash(pkt);

	outer->udp.check = 0;
	/* version and traffic class are the packet's; the label is of the flow (RFC 6438) */
	*(__be32 *)&outer->ip =
		(*(const __be32 *)pkt->ip6 & bpf_htonl(0xfff00000)) | bpf_htonl(hash & 0xfffff);
	outer->ip.payload_len = bpf_htons(length + (gue ? sizeof(struct udphdr) : 0));
	outer->ip.nexthdr = gue ? IPPROTO_UDP : IPPROTO_IPV6;
	outer->ip.hop_limit = OUTER_TTL;
	__builtin_memcpy(&outer->ip.saddr, source, sizeof(outer->ip.saddr));
	__builtin_memcpy(&outer->ip.daddr, destination, sizeof(outer->ip.daddr));
	fill_outer_udp(&outer->udp, hash, length);
}

/* Fills in xmit->outer4 or outer6 for a packet. Returns false if its headers are not readable. */
__noinline __u32 fill_outer(struct __sk_buff *skb, __u32 packed)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	bool gue;

	if (!EXTRA(tunnels) || !xmit || !pkt_locate(skb, &pkt))
		return false;
	gue = xmit->via == VIA_GUE;
	if (features.ipv6 && pkt.is_ipv6)
		fill_outer6(&xmit->outer6, &pkt, gue, xmit->egress, xmit->rewrite.destination);
	else
		fill_outer4(&xmit->outer4, &pkt, gue, xmit->egress[0], xmit->rewrite.destination[0]);
	return true;
}

/* Makes room for outer headers behind the Ethernet header. Returns false on failure. */
static __always_inline bool make_room(struct __sk_buff *skb, bool gue, bool ipv6)
{
	__u64 flags = ipv6 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;

	if (gue)
		flags |= BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
	/* without FIXED_GSO the kernel refuses GSO packets */
	return !bpf_skb_adjust_room(skb, tunnel_length(gue, ipv6), BPF_ADJ_ROOM_MAC,
				    flags | BPF_F_ADJ_ROOM_FIXED_GSO);
}

static __always_inline bool store_outer(struct __sk_buff *skb, const void *outer, const __u32 length)
{
	return !bpf_skb_store_bytes(skb, sizeof(struct ethhdr), outer, length, BPF_F_RECOMPUTE_CSUM);
}

/* Puts a packet into xmit->outer4 or outer6. Returns false on failure. */
__noinline __u32 push_outer(struct __sk_buff *skb, __u32 ipv6)
{
	struct xmit *xmit = get_xmit();
	bool gue;

	if (!EXTRA(tunnels) || !xmit)
		return false;
	gue = xmit->via == VIA_GUE;
	if (!make_room(skb, gue, features.ipv6 && ipv6))
		return false;
	if (features.ipv6 && ipv6)
		return gue ? store_outer(skb, &xmit->outer6, sizeof(xmit->outer6))
			   : store_outer(skb, &xmit->outer6, sizeof(xmit->outer6.ip));
	return gue ? store_outer(skb, &xmit->outer4, sizeof(xmit->outer4))
		   : store_outer(skb, &xmit->outer4, sizeof(xmit->outer4.ip));
}

#endif
