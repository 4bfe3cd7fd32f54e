/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Recirculates a clone that cannot be sent at once: it arrives again on the interface that the packet came in
 * by. The clone itself can then be fragmented, or queued by the kernel's neighbour table; the packet stays as
 * it is. The clone's headers are rewritten, and skb->cb has the rest, so that another generation can finish
 * it.
 */
#ifndef UDPLB_RECIRCULATE_H
#define UDPLB_RECIRCULATE_H

#define RECIRCULATE_MAGIC 0x75647062 /* "udpb" */

/* Words of skb->cb in a recirculated clone. */
enum cb_word {
	CB_MAGIC,
	CB_SECRET,   /* proves that the program has set the other words */
	CB_UPSTREAM, /* id, and CB_EGRESS_SOURCE or CB_HERE */
	CB_PACKET,   /* packed, see struct pkt */
	CB_FRAGMENT, /* number in the upper half, MTU in the lower one; MTU 0: the packet is sent whole */
};

/* xmit->egress_source. Ids are smaller. */
#define CB_EGRESS_SOURCE (1U << 31)

/* The clone is for this host, as it is. */
#define CB_HERE (1U << 30)

/* Result of resume_recirculated() for a packet that is not recirculated. */
#define ACTION_NONE 101

/* Copies the five words of skb->cb. */
static __always_inline void copy_words(__u32 *to, const __u32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
	to[4] = from[4];
}

/*
 * Recirculates one clone, or with `mtu` one clone for each fragment; `upstream` is for CB_UPSTREAM. Returns
 * false if the kernel refused one. Restores skb->cb.
 */
__noinline __u32 recirculate(struct __sk_buff *skb, __u32 packed, __u32 upstream, __u32 mtu, __u32 fragments)
{
	const struct sequences *sequences = get_sequences();
	struct xmit *xmit = get_xmit();
	bool cloned = true;
	__u32 number;

	if (!sequences || !xmit || features.dry_run)
		return features.dry_run;
	copy_words(xmit->cb, skb->cb);
	skb->cb[CB_MAGIC] = RECIRCULATE_MAGIC;
	skb->cb[CB_SECRET] = sequences->secret[0];
	skb->cb[CB_UPSTREAM] = upstream;
	skb->cb[CB_PACKET] = packed;
	for (number = 0; cloned && number < MAX_FRAGMENTS && number < fragments; number++) {
		skb->cb[CB_FRAGMENT] = number << 16 | mtu;
		cloned = !bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	}
	copy_words(skb->cb, xmit->cb);
	return cloned;
}

/* Reads the addresses of a rewritten packet. */
static __always_inline void read_rewrite(const struct pkt *pkt, struct rewrite *rw)
{
	__builtin_memset(rw, 0, sizeof(*rw));
	if (pkt->is_ipv6) {
		__builtin_memcpy(rw->source, &pkt->ip6->saddr, sizeof(rw->source));
		__builtin_memcpy(rw->destination, &pkt->ip6->daddr, sizeof(rw->destination));
	} else {
		rw->source[0] = pkt->ip->saddr;
		rw->destination[0] = pkt->ip->daddr;
	}
}

/* Sends a recirculated clone. Returns the verdict; the original has been counted as sent already. */
static __always_inline enum verdict xmit_recirculated(struct __sk_buff *skb, struct pkt *pkt, __u32 upstream,
						      int *action)
{
	struct xmit *xmit = get_xmit();
	enum verdict verdict;

	if (!xmit || !pkt_pull(skb, pkt))
		return VERDICT_CLONE_FAILED;
	xmit->upstream = upstream & ~CB_EGRESS_SOURCE;
	xmit->egress_source = upstream & CB_EGRESS_SOURCE;
	read_rewrite(pkt, &xmit->rewrite);
	verdict = resolve_nexthop(skb, pkt, ip_length(skb, pkt), xmit);
	if (!is_sent(verdict))
		return verdict;
	copy_macs(pkt->eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, pkt);
	*action = redirect(skb, xmit);
	return verdict;
}

/* Returns true if skb->cb has the secret. */
static __always_inline bool is_recirculated(struct __sk_buff *skb)
{
	const struct sequences *sequences = get_sequences();

	return sequences && skb->cb[CB_SECRET] == (__u32)sequences->secret[0];
}

/*
 * Processes a recirculated clone, and makes it the fragment that skb->cb names. Returns ACTION_NONE for
 * other packets that happen to carry the magic number.
 */
__noinline int resume_recirculated(struct __sk_buff *skb, __u32 l2)
{
	__u32 upstream = skb->cb[CB_UPSTREAM], packed = skb->cb[CB_PACKET];
	__u32 number = skb->cb[CB_FRAGMENT] >> 16, mtu = skb->cb[CB_FRAGMENT] & 0xffff;
	struct pkt pkt = pkt_of(number ? packed | PKT_F_LATER_FRAGMENT : packed);
	enum verdict verdict = VERDICT_CLONE_FAILED;
	int action = TC_ACT_SHOT;

	if (!is_recirculated(skb))
		return ACTION_NONE;
	/* with the magic number, so that interfaces above pass it on too */
	if (upstream & CB_HERE)
		return TC_ACT_UNSPEC;
	skb->cb[CB_MAGIC] = 0;
	if ((l2 || push_ethernet(skb)) && (!mtu || make_fragment(skb, packed, number, mtu)))
		verdict = xmit_recirculated(skb, &pkt, upstream, &action);
	if (!is_sent(verdict))
		count_verdict(skb, PKT_UNKNOWN, 0, upstream & ~CB_EGRESS_SOURCE, verdict);
	return action;
}

#endif
