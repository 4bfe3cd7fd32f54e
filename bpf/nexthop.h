/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Resolves the next hop of an upstream: from the lease, the kernel's FIB, or what user space resolved. */
#ifndef UDPLB_NEXTHOP_H
#define UDPLB_NEXTHOP_H

/* Next hop of a packet. The verdict of resolve_nexthop() determines which members are set. */
struct hop {
	__u8 macs[2 * ETH_ALEN] __attribute__((aligned(8))); /* destination and source */
	__u32 ifindex;
	__u32 family;
	__be32 gateway[4];
	__u16 mtu;	      /* 0: unknown */
	bool check_pmtu;      /* the kernel's path MTU is due to be queried */
	bool resolved;	      /* `macs` is set, or the interface needs none */
	enum verdict verdict; /* of a packet that fits the MTU */
};

/*
 * State of the packet that is sent. In a map, because all functions of a call chain share 512 bytes of stack.
 */
struct xmit {
	__u32 upstream; /* id */
	__u32 index;	/* of the upstream */
	__u64 flow;	/* handle of the packet's flow; 0: none */
	__u32 epoch;	/* read before the decision that leads here */
	bool leased;	/* the next hop is that of the lease */
	struct copies {
		__u32 first; /* upstream index */
		__u32 receivers;
		__u32 rule;  /* id under which the packet is counted; 0: not */
		__u32 block; /* the last receiver gets the packet itself */
		__u32 ipv6;
		__u32 sender_table; /* of the rule */
	} copies;		    /* of a packet on the fast path */
	bool egress_source; /* the source is this host's address, which user space resolved with the next hop
			     */
	struct rewrite rewrite;
	enum via via;	  /* with is_direct(), rewrite.destination only leads to the next hop */
	__be32 kept[4];	  /* destination of such a packet */
	__be32 egress[4]; /* source of the outer header */
	union {
		struct outer4 outer4;
		struct outer6 outer6;
	};
	struct hop hop;
	struct bpf_fib_lookup fib;
	struct bpf_redir_neigh neighbour;
	struct headers saved;
	__u32 fragments;		 /* number of fragments to send; 0: the packet is sent whole */
	__u32 cb[5];			 /* of the skb, as it arrived */
	__u32 options[MAX_OPTION_WORDS]; /* of the IPv4 header of a packet that is fragmented */
	__u32 option_end;		 /* offset of the next option */
	__u32 option_blank;		 /* the current option is replaced by no-operations */
	__u8 shifted[SHIFTED_BYTES];
	volatile enum checksum checksum; /* volatile: else the verifier explores the rest for each value */
	__u32 csum_delta;		 /* added to skb->csum */
	/* of check_options(); volatile for the same reason */
	volatile __u32 option_offset, option_malformed, option_unfinished;
	__u32 allow_martians; /* the packet's rule forwards any source */
};

/* Per CPU: xmit_upstream() ends before any packet that it sends is received again. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct xmit);
} xmit_scratch SEC(".maps");

static __always_inline struct xmit *get_xmit(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&xmit_scratch, &only);
}

/* Returns true for a packet that keeps its destination. */
static __always_inline bool is_direct(const struct xmit *xmit)
{
	return EXTRA(direct) && xmit->via != VIA_ADDRESS;
}

/* Returns true for a packet that is sent in outer headers. */
static __always_inline bool is_tunnel(const struct xmit *xmit)
{
	return EXTRA(tunnels) && xmit->via >= VIA_IPIP;
}

#include "neighbour.h"

/* Copies a MAC address by half-words, the alignment of the stack; memcpy would copy bytes. */
static __always_inline void copy_mac(void *to, const void *from)
{
	*(__u16 *)to = *(const __u16 *)from;
	*(__u16 *)(to + 2) = *(const __u16 *)(from + 2);
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

static __always_inline bool is_zero_mac(const __u8 *mac)
{
	const __u16 *words = (const void *)mac;

	return !(words[0] | words[1] | words[2]);
}

/* Returns true for a packet that is sent, or queued by the kernel's neighbour table. */
static __always_inline bool is_sent(enum verdict verdict)
{
	return verdict == VERDICT_FORWARDED || verdict == VERDICT_STALE_NEIGHBOUR ||
	       verdict == VERDICT_UNRESOLVED;
}

static __always_inline bool is_same_mac(const void *one, const void *other)
{
	const __u16 *ones = one, *others = other;

	return !((ones[0] ^ others[0]) | (ones[1] ^ others[1]) | (ones[2] ^ others[2]));
}

static __always_inline bool is_same_address(const __be32 *one, const __be32 *other)
{
	return !((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) | (one[3] ^ other[3]));
}

/* Returns true for a link-local address (RFC 4291, section 2.5.6). */
static __always_inline bool is_link_local(const __be32 *address)
{
	return (address[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* Returns true unless an address is multicast, unspecified or loopback. */
static __always_inline bool is_unicast_ipv6(const __be32 *address)
{
	return (address[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000) &&
	       (address[0] | address[1] | address[2] | (address[3] & ~bpf_htonl(1)));
}

/*
 * Returns true if the rewritten addresses are those of a packet that no router forwards (RFC 4291, sections
 * 2.5.2, 2.5.3, 2.5.6 and 2.7), or if source and destination are the same, which receivers drop.
 */
__noinline __u32 is_martian_rewrite(__u32 packed)
{
	const struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	const struct rewrite *rw;

	if (!xmit)
		return true;
	rw = &xmit->rewrite;
	if (!pkt_has(&pkt, PKT_F_IPV6))
		return !xmit->allow_martians && rw->source[0] == rw->destination[0];
	return !is_unicast_ipv6(rw->source) ||
	       (is_link_local(rw->source) && !is_link_local(rw->destination)) ||
	       (!xmit->allow_martians && is_same_address(rw->source, rw->destination));
}

/* Returns the slot of an upstream id; NULL if its chunk does not exist. */
static __always_inline struct nexthop_slot *nexthop_slot(__u32 upstream)
{
	__u32 chunk = upstream / NEXTHOPS_PER_CHUNK, index = upstream % NEXTHOPS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&nexthops, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &index) : NULL;
}

/* Reads the sequence of a slot from memory each time, as a reader of a sequence lock does. */
static __always_inline __u32 sequence_of(const struct nexthop_slot *slot)
{
	return *(const volatile __u32 *)&slot->sequence;
}

/* Returns the current copy of a slot; NULL if it belongs to another address. */
static __always_inline const struct nexthop *cached_nexthop(const struct nexthop_slot *slot, __u32 sequence,
							    const __be32 *address)
{
	const struct nexthop *cached = &slot->copies[sequence & 1];

	if (!is_same_address(cached->address, address))
		cached = NULL;
	/* else clang tests the words again, and the verifier of 6.1 does not know the pointer by them */
	barrier_var(cached);
	return cached;
}

/* Returns true if arpd reports an upstream as down. */
static __always_inline bool is_down(const struct upstream *upstream)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream->id);
	const struct nexthop *cached;

	if (!slot || !(cached = cached_nexthop(slot, sequence_of(slot), upstream->address)))
		return false;
	return cached->health >= HEALTH_DOWN && lease_holds();
}

/* Stores this host's source address towards an upstream. Returns false if it is not known. */
static __always_inline bool egress_address(const struct upstream *upstream, __be32 *address)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream->id);
	const struct nexthop *cached;
	__u32 sequence;

	if (!slot)
		return false;
	sequence = sequence_of(slot);
	cached = cached_nexthop(slot, sequence, upstream->address);
	if (!cached)
		return false;
	__builtin_memcpy(address, cached->egress, sizeof(cached->egress));
	return (address[0] | address[1] | address[2] | address[3]) && sequence_of(slot) == sequence;
}

enum lease_state {
	LEASE_UNUSABLE, /* it has expired, or has no MAC addresses for the next hop */
	LEASE_DOWN,	/* the upstream is down */
	LEASE_VALID,
};

/* Fills in the next hop that arpd keeps resolved. */
static __always_inline enum lease_state nexthop_from_lease(struct xmit *xmit)
{
	struct hop *hop = &xmit->hop;
	const struct nexthop_slot *slot;
	const struct nexthop *cached;
	__u32 sequence;

	if (!lease_holds() || !(slot = nexthop_slot(xmit->upstream)))
		return LEASE_UNUSABLE;
	sequence = sequence_of(slot);
	cached = cached_nexthop(slot, sequence, xmit->rewrite.destination);
	if (!cached || !cached->ifindex)
		return LEASE_UNUSABLE;
	if (cached->health == HEALTH_DOWN)
		return LEASE_DOWN;
	if (cached->macs < MACS_FRESH)
		return LEASE_UNUSABLE;
	hop->ifindex = cached->ifindex;
	copy_macs(hop->macs, cached->destination);
	hop->mtu = cached->mtu;
	hop->resolved = true;
	if (features.dry_run)
		__builtin_memcpy(hop->gateway, cached->gateway, sizeof(hop->gateway));
	hop->check_pmtu = age(slot->pmtu_checked) >= PMTU_POLL_SECONDS * features.ticks_per_second;
	/* after two writes in between, the copy may be torn */
	return sequence_of(slot) == sequence ? LEASE_VALID : LEASE_UNUSABLE;
}

/*
 * Fills in interface and gateway that user space resolved, for interfaces that the kernel does not route for.
 * The kernel's neighbour table knows whether the gateway answers.
 */
static __always_inline enum verdict nexthop_from_cache(struct __sk_buff *skb, const struct xmit *xmit,
						       struct hop *hop)
{
	const struct nexthop_slot *slot = nexthop_slot(xmit->upstream);
	enum verdict verdict = VERDICT_STALE_NEIGHBOUR;
	const struct nexthop *cached;
	__u32 sequence, gateway;

	if (!slot)
		return VERDICT_NO_ROUTE;
	sequence = sequence_of(slot);
	cached = cached_nexthop(slot, sequence, xmit->rewrite.destination);
	if (!cached || !cached->ifindex)
		return VERDICT_NO_ROUTE;
	hop->ifindex = cached->ifindex;
	hop->family = cached->family;
	__builtin_memcpy(hop->gateway, cached->gateway, sizeof(hop->gateway));
	hop->mtu = cached->mtu;
	hop->resolved = cached->macs == MACS_NONE;
	if (cached->macs == MACS_UNKNOWN)
		verdict = VERDICT_UNRESOLVED;
	if (sequence_of(slot) != sequence)
		return VERDICT_NO_NEIGHBOUR;
	if (hop->resolved)
		return VERDICT_FORWARDED;
	gateway = gateway_state(skb);
	if (gateway == NEIGHBOUR_UNREADABLE)
		return verdict;
	return gateway == NEIGHBOUR_VALID ? VERDICT_FORWARDED : VERDICT_UNRESOLVED;
}

/* Returns what user space resolved if it uses that interface (0: any), else NULL. */
static __always_inline const struct nexthop *cached_nexthop_via(const struct xmit *xmit, __u32 ifindex)
{
	const struct nexthop_slot *slot = nexthop_slot(xmit->upstream);
	const struct nexthop *cached =
		slot ? cached_nexthop(slot, sequence_of(slot), xmit->rewrite.destination) : NULL;

	return cached && (!ifindex || cached->ifindex == ifindex) ? cached : NULL;
}

/* Returns the length of the outgoing IP packet; for a GSO packet, that of a segment. */
static __always_inline __u32 ip_length(struct __sk_buff *skb, const struct pkt *pkt)
{
	if (skb->gso_size)
		return segment_headers(skb, pkt->packed) - sizeof(struct ethhdr) + skb->gso_size;
	return total_length(pkt);
}

/* Fills the query of the kernel's FIB for a packet of that length. */
static __always_inline void fill_fib_query(struct __sk_buff *skb, const struct pkt *pkt,
					   const struct rewrite *rw, __u32 length, struct bpf_fib_lookup *fib)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = AF_INET;
	fib->l4_protocol = IPPROTO_UDP;
	/* the kernel compares it with the MTU; a GSO packet's own length would not fit */
	fib->tot_len = length;
	fib->ifindex = skb->ifindex;
	if (pkt->has_udp) {
		fib->sport = rewrites_source_port(rw) ? rw->source_port : pkt->udp->source;
		fib->dport = rw->port ?: pkt->udp->dest;
	}
	if (pkt->is_ipv6) {
		fib->family = AF_INET6;
		fib->flowinfo = *(__be32 *)pkt->ip6 & bpf_htonl(0x0fffffff);
		__builtin_memcpy(fib->ipv6_src, rw->source, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, rw->destination, sizeof(fib->ipv6_dst));
	} else {
		fib->tos = pkt->ip->tos;
		fib->ipv4_src = rw->source[0];
		/* ipv4_dst, with zeroes behind it: the gateway is compared as a whole */
		fib->ipv6_dst[0] = rw->destination[0];
	}
}

/* Fills in the next hop of a lookup with BPF_FIB_LKUP_RET_SUCCESS. */
static __always_inline void fill_hop_from_fib(struct hop *hop, const struct bpf_fib_lookup *fib)
{
	hop->ifindex = fib->ifindex;
	copy_mac(hop->macs, fib->dmac);
	copy_mac(hop->macs + ETH_ALEN, fib->smac);
	hop->mtu = fib->mtu_result;
	hop->resolved = true;
	if (features.dry_run)
		__builtin_memcpy(hop->gateway, fib->ipv6_dst, sizeof(hop->gateway));
}

/*
 * Returns true if the FIB chose another interface than the one whose address is the source. Before 6.15 the
 * kernel hashes flows over multiple paths whatever their source is.
 */
static __always_inline bool is_other_interface(const struct xmit *xmit, int result)
{
	const struct nexthop *cached;

	if (!xmit->egress_source ||
	    (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH))
		return false;
	cached = cached_nexthop_via(xmit, 0);
	return cached && cached->ifindex != xmit->fib.ifindex;
}

/* Fills in a next hop without a MAC address in the kernel; its interface may need none. */
static __always_inline enum verdict nexthop_from_gateway(const struct xmit *xmit, struct hop *hop)
{
	const struct bpf_fib_lookup *fib = &xmit->fib;
	const struct nexthop *cached = cached_nexthop_via(xmit, fib->ifindex);

	hop->ifindex = fib->ifindex;
	hop->family = fib->family;
	__builtin_memcpy(hop->gateway, fib->ipv6_dst, sizeof(hop->gateway));
	if (!cached)
		return VERDICT_UNRESOLVED;
	hop->mtu = cached->mtu;
	hop->resolved = cached->macs == MACS_NONE;
	return hop->resolved ? VERDICT_FORWARDED : VERDICT_UNRESOLVED;
}

/* Looks up the next hop again, for a packet of the MTU instead of one that is too large. */
static __always_inline enum verdict nexthop_for_mtu(struct __sk_buff *skb, struct xmit *xmit, __u16 mtu)
{
	struct bpf_fib_lookup *fib = &xmit->fib;
	int result;

	fib->tot_len = mtu;
	result = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return VERDICT_NO_ROUTE;
	if (is_other_interface(xmit, result))
		return nexthop_from_cache(skb, xmit, &xmit->hop);
	if (result == BPF_FIB_LKUP_RET_NO_NEIGH || is_zero_mac(fib->dmac))
		return nexthop_from_gateway(xmit, &xmit->hop);
	fill_hop_from_fib(&xmit->hop, fib);
	return VERDICT_FORWARDED;
}

/*
 * Returns the MTU that a packet of that length exceeds; 0: unknown. From 5.12 on the lookup returns it in
 * place of tot_len.
 */
static __always_inline __u16 fitting_mtu(const struct xmit *xmit, __u32 length)
{
	const struct nexthop *cached;
	__u16 mtu = xmit->fib.mtu_result;

	if (mtu >= length) {
		cached = cached_nexthop_via(xmit, 0);
		mtu = cached ? cached->mtu : 0;
	}
	return mtu < length ? mtu : 0;
}

/*
 * Resolves the next hop for a FIB result other than a complete success; returns as resolve_nexthop(). A
 * global function so that its outcomes do not multiply the paths that the verifier explores.
 */
__noinline __u32 nexthop_fallback(struct __sk_buff *skb, __u32 result, __u32 length)
{
	struct xmit *xmit = get_xmit();
	struct hop *hop;
	__u16 mtu;

	if (!xmit)
		return VERDICT_NO_ROUTE;
	hop = &xmit->hop;
	__builtin_memset(hop, 0, sizeof(*hop));
	switch (result) {
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		mtu = fitting_mtu(xmit, length);
		hop->verdict = VERDICT_NO_ROUTE;
		if (mtu && xmit->fib.family == AF_INET)
			hop->verdict = nexthop_for_mtu(skb, xmit, mtu);
		hop->mtu = mtu;
		return VERDICT_MTU;
	case BPF_FIB_LKUP_RET_SUCCESS: /* without MAC: before 6.3, while the kernel resolves it */
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return nexthop_from_gateway(xmit, hop);
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return nexthop_from_cache(skb, xmit, hop);
	default:
		return VERDICT_NO_ROUTE;
	}
}

/*
 * Records the path MTU of a FIB result while the next hop comes from the lease: so what this host's other
 * traffic has learned applies to upstreams.
 */
__noinline __u32 learn_fib_mtu(__u32 result, __u32 length)
{
	struct xmit *xmit = get_xmit();
	struct nexthop_slot *slot = xmit ? nexthop_slot(xmit->upstream) : NULL;

	if (!slot)
		return 0;
	slot->pmtu_checked = bpf_jiffies64();
	if (result == BPF_FIB_LKUP_RET_FRAG_NEEDED && xmit->fib.mtu_result < length)
		update_pmtu((const struct key_address *)xmit->rewrite.destination, xmit->fib.mtu_result,
			    2 * PMTU_POLL_SECONDS);
	return 0;
}

/*
 * Looks up xmit->fib for an IP packet of that length. Returns BPF_FIB_LKUP_RET_*. A global function, else the
 * verifier would explore it for each state of the lease.
 */
__noinline int lookup_fib(struct __sk_buff *skb, __u32 packed, __u32 length)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();

	if (!xmit || !pkt_locate(skb, &pkt))
		return BPF_FIB_LKUP_RET_FWD_DISABLED;
	fill_fib_query(skb, &pkt, &xmit->rewrite, length, &xmit->fib);
	/* only the configuration knows the link of a link-local address */
	if (pkt.is_ipv6 && is_link_local(xmit->fib.ipv6_dst))
		return BPF_FIB_LKUP_RET_FWD_DISABLED;
	return bpf_fib_lookup(skb, &xmit->fib, sizeof(xmit->fib), 0);
}

/* Resolves the next hop by the kernel's FIB, or else by what user space resolved; as resolve_nexthop(). */
static __always_inline enum verdict nexthop_from_fib(struct __sk_buff *skb, const struct pkt *pkt,
						     __u32 length, bool is_leased, struct xmit *xmit)
{
	const struct bpf_fib_lookup *fib = &xmit->fib;
	int result = lookup_fib(skb, pkt->packed, length);

	if (is_leased) {
		learn_fib_mtu(result, length);
		return VERDICT_FORWARDED;
	}
	if (is_other_interface(xmit, result))
		result = BPF_FIB_LKUP_RET_FWD_DISABLED;
	if (result != BPF_FIB_LKUP_RET_SUCCESS || is_zero_mac(fib->dmac))
		return nexthop_fallback(skb, result, length);
	fill_hop_from_fib(&xmit->hop, fib);
	return VERDICT_FORWARDED;
}

/* Lowers the MTU of the next hop to the recorded path MTU. */
__noinline __u32 apply_pmtu(void)
{
	struct xmit *xmit = get_xmit();
	const struct path_mtu *recorded;

	if (!xmit)
		return 0;
	recorded = bpf_map_lookup_elem(&path_mtus, xmit->rewrite.destination);
	if (recorded && is_future(recorded->until) && (!xmit->hop.mtu || recorded->mtu < xmit->hop.mtu))
		xmit->hop.mtu = recorded->mtu;
	return 0;
}

/*
 * Resolves xmit->hop for an IP packet of that length to xmit->upstream. By verdict, it has
 *   FORWARDED: interface and MAC addresses, unless the interface needs none;
 *   STALE_NEIGHBOUR, UNRESOLVED: interface and gateway;
 *   MTU: the MTU, 0 if unknown, and in hop.verdict the verdict of a packet that fits.
 */
static __always_inline enum verdict resolve_nexthop(struct __sk_buff *skb, const struct pkt *pkt,
						    __u32 length, struct xmit *xmit)
{
	bool is_large = length > min_pmtu(pkt->is_ipv6);
	enum lease_state lease_state = nexthop_from_lease(xmit);
	enum verdict verdict = VERDICT_FORWARDED;
	struct hop *hop = &xmit->hop;

	xmit->leased = lease_state == LEASE_VALID;
	if (lease_state == LEASE_DOWN)
		return VERDICT_NO_NEIGHBOUR;
	if (lease_state == LEASE_UNUSABLE || (is_large && hop->check_pmtu))
		verdict = nexthop_from_fib(skb, pkt, length, lease_state == LEASE_VALID, xmit);
	if (verdict != VERDICT_MTU)
		hop->verdict = verdict;
	if (is_large && has_pmtus())
		apply_pmtu();
	return is_sent(verdict) && hop->mtu && length > hop->mtu ? VERDICT_MTU : verdict;
}

#endif
