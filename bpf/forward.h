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

/* Where a packet goes: what of it is known depends on the verdict beside it. */
struct way {
	__u8 frame[2 * ETH_ALEN] __attribute__((aligned(8))); /* as they stand in it: destination, source */
	__u32 ifindex;
	__u32 family;
	__be32 gateway[4];
};

/* Half-word by half-word, as the stack is aligned: a plain copy would go byte by byte. */
static __always_inline void copy_mac(void *to, const void *from)
{
	*(__u16 *)to = *(const __u16 *)from;
	*(__u16 *)(to + 2) = *(const __u16 *)(from + 2);
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

/* Both MAC addresses of a frame at once. */
static __always_inline void copy_macs(void *to, const void *from)
{
	*(__u64 *)to = *(const __u64 *)from;
	*(__u32 *)(to + 8) = *(const __u32 *)(from + 8);
}

static __always_inline bool is_no_mac(const __u8 *mac)
{
	const __u16 *words = (const void *)mac;

	return !(words[0] | words[1] | words[2]);
}

static __always_inline bool is_same_address(const __be32 *one, const __be32 *other)
{
	return !((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) | (one[3] ^ other[3]));
}

static __always_inline const struct nexthop_slot *nexthop_slot(const struct upstream *upstream)
{
	__u32 chunk = upstream->id / NEXTHOPS_PER_CHUNK, index = upstream->id % NEXTHOPS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&nexthops, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &index) : NULL;
}

static __always_inline __u32 sequence_of(const struct nexthop_slot *slot)
{
	return *(const volatile __u32 *)&slot->sequence;
}

/* Somebody lives who takes back what is no longer so. */
static __always_inline bool lease_holds(void)
{
	const __u32 only = 0;
	const struct heartbeat *last = bpf_map_lookup_elem(&heartbeat, &only);

	return last && (__s64)(last->until - bpf_jiffies64()) > 0;
}

/* Whether an upstream is known not to answer. */
static __always_inline bool is_down(const struct upstream *upstream)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known;

	if (!slot)
		return false;
	known = &slot->copies[sequence_of(slot) & 1];
	return known->address[0] == upstream->address && known->health == HEALTH_DOWN && lease_holds();
}

/* The way that user space vouches for; false where it does not, or no longer. */
static __always_inline bool leased_way(const struct upstream *upstream, struct way *way, __u16 *mtu)
{
	const struct nexthop_slot *slot;
	const struct nexthop *known;
	__u32 sequence;

	if (!lease_holds() || !(slot = nexthop_slot(upstream)))
		return false;
	sequence = sequence_of(slot);
	known = &slot->copies[sequence & 1];
	if (known->address[0] != upstream->address || known->macs != MACS_FRESH)
		return false;
	way->ifindex = known->ifindex;
	copy_macs(way->frame, known->destination);
	*mtu = known->mtu;
	/* two writes since: what was read may be a mixture */
	return sequence_of(slot) == sequence;
}

/*
 * What user space resolved once, where the kernel's routing knows no MAC address (`routed`:
 * `way` has interface and gateway) or does not route at all.
 */
static __noinline enum verdict expired_way(const struct upstream *upstream, struct way *way, __u32 length,
					   bool routed)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known;
	__u32 sequence;

	if (!slot)
		return routed ? VERDICT_NO_NEIGHBOUR : VERDICT_NO_ROUTE;
	sequence = sequence_of(slot);
	known = &slot->copies[sequence & 1];
	if (known->address[0] != upstream->address || !known->ifindex)
		return routed ? VERDICT_NO_NEIGHBOUR : VERDICT_NO_ROUTE;
	if (routed && (known->ifindex != way->ifindex || !is_same_address(known->gateway, way->gateway)))
		return VERDICT_NO_NEIGHBOUR;
	way->ifindex = known->ifindex;
	way->family = known->family;
	__builtin_memcpy(way->gateway, known->gateway, sizeof(way->gateway));
	copy_macs(way->frame, known->destination);
	if (known->mtu && length > known->mtu)
		return VERDICT_MTU;
	if (known->macs == MACS_UNKNOWN || sequence_of(slot) != sequence)
		return VERDICT_NO_NEIGHBOUR;
	return VERDICT_STALE_NEIGHBOUR;
}

/* What the kernel's routing says; of a missing neighbour interface and gateway are known. */
static __always_inline int routed_way(struct __sk_buff *skb, const struct packet *packet,
				      const struct upstream *upstream, __be32 source, struct way *way,
				      __u16 *mtu)
{
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.l4_protocol = IPPROTO_UDP,
		.sport = packet->udp->source,
		.dport = upstream->port ?: packet->udp->dest,
		/* without it, or with the whole of a GSO packet, the kernel would judge by another length or
		   MTU */
		.tot_len = ip_length(skb, packet),
		.ifindex = skb->ifindex,
		.tos = packet->ip->tos,
		.ipv4_src = source,
		/* .ipv4_dst, and zeroes behind it: the gateway is compared as a whole */
		.ipv6_dst = {upstream->address},
	};
	int result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);

	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return result;
	way->ifindex = fib.ifindex;
	/* before 6.3 the kernel takes a neighbour that it is still asking for as known */
	if (result == BPF_FIB_LKUP_RET_NO_NEIGH || is_no_mac(fib.dmac)) {
		way->family = fib.family;
		__builtin_memcpy(way->gateway, fib.ipv6_dst, sizeof(way->gateway));
		return BPF_FIB_LKUP_RET_NO_NEIGH;
	}
	copy_mac(way->frame, fib.dmac);
	copy_mac(way->frame + ETH_ALEN, fib.smac);
	*mtu = fib.mtu_result; /* takes the place of tot_len, from 5.12 on */
	return result;
}

/*
 * Fills `way`. MAC addresses are there with VERDICT_FORWARDED and VERDICT_STALE_NEIGHBOUR,
 * interface and gateway with VERDICT_NO_NEIGHBOUR too, and nothing with any other.
 */
static __always_inline enum verdict next_hop(struct __sk_buff *skb, const struct packet *packet,
					     const struct upstream *upstream, __be32 source, struct way *way)
{
	__u32 length = ip_length(skb, packet);
	__u16 mtu = 0;

	if (leased_way(upstream, way, &mtu))
		return mtu && length > mtu ? VERDICT_MTU : VERDICT_FORWARDED;
	switch (routed_way(skb, packet, upstream, source, way, &mtu)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		return mtu && length > mtu ? VERDICT_MTU : VERDICT_FORWARDED;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return VERDICT_MTU;
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return expired_way(upstream, way, length, true);
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return expired_way(upstream, way, length, false);
	default:
		return VERDICT_NO_ROUTE;
	}
}

/* `block`: gives the packet away by what next_hop() said; `action` is what the program is to return. */
static __always_inline enum verdict forward(struct __sk_buff *skb, struct packet *packet,
					    const struct upstream *upstream, __be32 source,
					    const struct way *way, enum verdict verdict, int *action)
{
	struct bpf_redir_neigh neighbour = {};
	enum checksum checksum = checksum_of(skb, packet);
	__u32 csum;

	if (verdict == VERDICT_FORWARDED)
		copy_macs(packet->eth, way->frame);
	else if (verdict != VERDICT_NO_NEIGHBOUR && verdict != VERDICT_STALE_NEIGHBOUR)
		return verdict;
	csum = rewrite(packet, checksum, source, upstream->address, upstream->port);
	if (checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, csum);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return VERDICT_CLONE_FAILED;
	if (verdict == VERDICT_FORWARDED) {
		*action = bpf_redirect(way->ifindex, 0);
		return VERDICT_FORWARDED;
	}
	/* the kernel asks for the neighbour and keeps the packet meanwhile */
	neighbour.nh_family = way->family;
	__builtin_memcpy(neighbour.ipv6_nh, way->gateway, sizeof(neighbour.ipv6_nh));
	*action = bpf_redirect_neigh(way->ifindex, &neighbour, sizeof(neighbour), 0);
	return VERDICT_FORWARDED;
}

/*
 * `pass`: sends a copy by what next_hop() said, and leaves the packet as it came: every byte, the tag and
 * skb->csum. Where it cannot be left so it must not go up, and `action` is to drop it.
 */
static __always_inline enum verdict copy(struct __sk_buff *skb, struct packet *packet,
					 const struct upstream *upstream, __be32 source,
					 const struct way *way, enum verdict verdict, int *action)
{
	enum checksum checksum = checksum_of(skb, packet);
	__be16 tag_protocol = skb->vlan_proto;
	bool tagged = skb->vlan_present;
	__u16 tag = skb->vlan_tci;
	struct headers original;
	__u32 csum;

	if (verdict != VERDICT_FORWARDED && verdict != VERDICT_STALE_NEIGHBOUR)
		return verdict;
	save(packet, &original);
	copy_macs(packet->eth, way->frame);
	csum = rewrite(packet, checksum, source, upstream->address, upstream->port);
	if (checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, csum);
	if ((tagged && bpf_skb_vlan_pop(skb)) || bpf_clone_redirect(skb, way->ifindex, 0))
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
