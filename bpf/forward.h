/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Next hop, MTU, and the two ways out: the packet itself or a copy of it. */
#ifndef UDPLB_FORWARD_H
#define UDPLB_FORWARD_H

#define AF_INET 2

/* Length of the IP packet that goes out: of a segment where the device or the kernel cuts it up. */
static __always_inline __u32 ip_length(struct __sk_buff *skb, const struct packet *packet)
{
	if (skb->gso_size)
		return packet->ip->ihl * 4 + sizeof(struct udphdr) + skb->gso_size;
	return bpf_ntohs(packet->ip->tot_len);
}

/* The way that user space resolved, for a kernel that does not route here (ip_forward is off). */
static __always_inline enum verdict known_hop(struct __sk_buff *skb, const struct packet *packet,
					      const struct upstream *upstream, struct bpf_fib_lookup *hop)
{
	const struct nexthop *known = bpf_map_lookup_elem(&nexthops, &upstream->id);

	if (!known || known->address != upstream->address || !known->ifindex)
		return VERDICT_NO_ROUTE;
	if (known->mtu && ip_length(skb, packet) > known->mtu)
		return VERDICT_MTU;
	hop->ifindex = known->ifindex;
	hop->family = known->family;
	__builtin_memcpy(hop->ipv6_dst, known->gateway, sizeof(hop->ipv6_dst));
	if (!known->resolved)
		return VERDICT_NO_NEIGHBOUR;
	__builtin_memcpy(hop->dmac, known->destination, ETH_ALEN);
	__builtin_memcpy(hop->smac, known->source, ETH_ALEN);
	return VERDICT_STALE_NEIGHBOUR;
}

/*
 * Fills `hop`: interface, gateway, and both MAC addresses where the verdict is a forwarding
 * one. With VERDICT_NO_NEIGHBOUR interface and gateway are known, with any other nothing is.
 */
static __always_inline enum verdict next_hop(struct __sk_buff *skb, const struct packet *packet,
					     const struct upstream *upstream, __be32 source,
					     struct bpf_fib_lookup *hop)
{
	__builtin_memset(hop, 0, sizeof(*hop));
	hop->family = AF_INET;
	hop->l4_protocol = IPPROTO_UDP;
	hop->sport = packet->udp->source;
	hop->dport = upstream->port ?: packet->udp->dest;
	/* without it, or with the whole of a GSO packet, the kernel would judge by another length or MTU */
	hop->tot_len = ip_length(skb, packet);
	hop->ifindex = skb->ifindex;
	hop->tos = packet->ip->tos;
	hop->ipv4_src = source;
	hop->ipv4_dst = upstream->address;
	switch (bpf_fib_lookup(skb, hop, sizeof(*hop), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		/* mtu_result takes the place of tot_len, from 5.12 on */
		if (hop->mtu_result && ip_length(skb, packet) > hop->mtu_result)
			return VERDICT_MTU;
		return VERDICT_FORWARDED;
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return VERDICT_NO_NEIGHBOUR;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return VERDICT_MTU;
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return known_hop(skb, packet, upstream, hop);
	default:
		return VERDICT_NO_ROUTE;
	}
}

/* Half-word by half-word, as the stack is aligned: a plain copy would go byte by byte. */
static __always_inline void copy_mac(void *to, const void *from)
{
	*(__u16 *)to = *(const __u16 *)from;
	*(__u16 *)(to + 2) = *(const __u16 *)(from + 2);
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

static __always_inline void address_frame(struct ethhdr *eth, const struct bpf_fib_lookup *hop)
{
	copy_mac(eth->h_dest, hop->dmac);
	copy_mac(eth->h_source, hop->smac);
}

/* `block`: gives the packet away; `action` is what the program is to return. */
static __always_inline enum verdict forward(struct __sk_buff *skb, struct packet *packet,
					    const struct upstream *upstream, __be32 source, int *action)
{
	struct bpf_redir_neigh neighbour = {};
	enum checksum checksum = checksum_of(skb, packet);
	struct bpf_fib_lookup hop;
	enum verdict verdict;
	__u32 csum;

	verdict = next_hop(skb, packet, upstream, source, &hop);
	if (verdict == VERDICT_FORWARDED)
		address_frame(packet->eth, &hop);
	else if (verdict != VERDICT_NO_NEIGHBOUR && verdict != VERDICT_STALE_NEIGHBOUR)
		return verdict;
	csum = rewrite(packet, checksum, source, upstream->address, upstream->port);
	if (checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, csum);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return VERDICT_CLONE_FAILED;
	if (verdict == VERDICT_FORWARDED) {
		*action = bpf_redirect(hop.ifindex, 0);
		return VERDICT_FORWARDED;
	}
	/* the kernel asks for the neighbour and keeps the packet meanwhile */
	neighbour.nh_family = hop.family;
	__builtin_memcpy(neighbour.ipv6_nh, hop.ipv6_dst, sizeof(neighbour.ipv6_nh));
	*action = bpf_redirect_neigh(hop.ifindex, &neighbour, sizeof(neighbour), 0);
	return VERDICT_FORWARDED;
}

/*
 * `pass`: sends a copy and leaves the packet as it came: every byte, the tag and skb->csum.
 * Where it cannot be left so it must not go up, and `action` is to drop it.
 */
static __always_inline enum verdict copy(struct __sk_buff *skb, struct packet *packet,
					 const struct upstream *upstream, __be32 source, int *action)
{
	enum checksum checksum = checksum_of(skb, packet);
	__be16 tag_protocol = skb->vlan_proto;
	bool tagged = skb->vlan_present;
	__u16 tag = skb->vlan_tci;
	struct bpf_fib_lookup hop;
	struct headers original;
	enum verdict verdict;
	__u32 csum;

	verdict = next_hop(skb, packet, upstream, source, &hop);
	if (verdict != VERDICT_FORWARDED && verdict != VERDICT_STALE_NEIGHBOUR)
		return verdict;
	save(packet, &original);
	address_frame(packet->eth, &hop);
	csum = rewrite(packet, checksum, source, upstream->address, upstream->port);
	if (checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, csum);
	if ((tagged && bpf_skb_vlan_pop(skb)) || bpf_clone_redirect(skb, hop.ifindex, 0))
		verdict = VERDICT_CLONE_FAILED;
	if (tagged && !skb->vlan_present && bpf_skb_vlan_push(skb, tag_protocol, tag))
		*action = TC_ACT_SHOT;
	if (checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, ~csum);
	if (locate(skb, packet))
		restore(packet, &original);
	else
		*action = TC_ACT_SHOT;
	return verdict;
}

#endif
