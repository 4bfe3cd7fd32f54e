/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A copy that cannot be sent at once comes in a second time, by the interface that the packet came in by: the
 * copy itself, and not the packet, can then be cut, or given to the kernel's neighbour table. Its headers are
 * rewritten; what else is to be known is in skb->cb, so that another generation may finish it.
 */
#ifndef UDPLB_RECIRCULATE_H
#define UDPLB_RECIRCULATE_H

#define RECIRCULATED 0x75647062

/* The words of skb->cb. */
enum recirculated {
	RECIRCULATED_MARK,
	RECIRCULATED_SECRET,   /* nobody but the program marks packets */
	RECIRCULATED_UPSTREAM, /* its id, and RECIRCULATED_OWN */
	RECIRCULATED_LAYOUT,
	RECIRCULATED_PIECE, /* its number, and the MTU in the lower half; 0: the whole packet */
};

/* See `own` of struct sending; no id is as large. */
#define RECIRCULATED_OWN (1U << 31)

/* Returned by resume() for a packet that has not come in again. */
#define ACTION_NONE 101

static __always_inline void copy_words(__u32 *to, const __u32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
	to[4] = from[4];
}

/* Has a copy come in again, or with `mtu` each of its pieces. Returns false where one was not taken. */
__noinline __u32 recirculate(struct __sk_buff *skb, __u32 layout, __u32 upstream, __u32 mtu, __u32 pieces)
{
	const struct tickets *tickets = get_tickets();
	struct sending *sending = get_sending();
	bool taken = true;
	__u32 piece;

	if (!tickets || !sending || features.asking)
		return features.asking;
	copy_words(sending->cb, skb->cb);
	skb->cb[RECIRCULATED_MARK] = RECIRCULATED;
	skb->cb[RECIRCULATED_SECRET] = tickets->secret[0];
	skb->cb[RECIRCULATED_UPSTREAM] = sending->own ? upstream | RECIRCULATED_OWN : upstream;
	skb->cb[RECIRCULATED_LAYOUT] = layout;
	for (piece = 0; taken && piece < MOST_PIECES && piece < pieces; piece++) {
		skb->cb[RECIRCULATED_PIECE] = piece << 16 | mtu;
		taken = !bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	}
	copy_words(skb->cb, sending->cb);
	return taken;
}

/* The label that a rewritten packet bears. */
static __always_inline void read_label(const struct packet *packet, struct label *label)
{
	__builtin_memset(label, 0, sizeof(*label));
	if (packet->is_ipv6) {
		__builtin_memcpy(label->source, &packet->ip6->saddr, sizeof(label->source));
		__builtin_memcpy(label->destination, &packet->ip6->daddr, sizeof(label->destination));
	} else {
		label->source[0] = packet->ip->saddr;
		label->destination[0] = packet->ip->daddr;
	}
}

/* Sends a copy that has come in again. Returns the verdict; what was sent has been counted before. */
static __always_inline enum verdict send_recirculated(struct __sk_buff *skb, __u32 layout, __u32 upstream,
						      int *action)
{
	struct sending *sending = get_sending();
	enum verdict verdict;
	struct packet packet;

	if (!sending ||
	    (!locate(skb, layout, &packet) && (!pull(skb, LAYOUT_MOST) || !locate(skb, layout, &packet))))
		return VERDICT_CLONE_FAILED;
	sending->upstream = upstream & ~RECIRCULATED_OWN;
	sending->own = upstream & RECIRCULATED_OWN;
	read_label(&packet, &sending->label);
	verdict = next_hop(skb, &packet, ip_length(skb, layout, &packet), sending);
	if (!is_sent(verdict))
		return verdict;
	copy_macs(packet.eth, sending->way.frame);
	sending->checksum = checksum_of(skb, layout);
	*action = give(skb, sending);
	return verdict;
}

static __always_inline bool is_recirculated(struct __sk_buff *skb)
{
	const struct tickets *tickets = get_tickets();

	return tickets && skb->cb[RECIRCULATED_SECRET] == (__u32)tickets->secret[0];
}

/* The whole way of a copy that has come in again; what else bears the mark is no copy. */
__noinline int resume(struct __sk_buff *skb, __u32 l2)
{
	__u32 upstream = skb->cb[RECIRCULATED_UPSTREAM], layout = skb->cb[RECIRCULATED_LAYOUT];
	__u32 piece = skb->cb[RECIRCULATED_PIECE] >> 16, mtu = skb->cb[RECIRCULATED_PIECE] & 0xffff;
	enum verdict verdict = VERDICT_CLONE_FAILED;
	int action = TC_ACT_SHOT;

	if (!is_recirculated(skb))
		return ACTION_NONE;
	skb->cb[RECIRCULATED_MARK] = 0;
	if ((l2 || add_header(skb)) && (!mtu || cut(skb, layout, piece, mtu)))
		verdict = send_recirculated(skb, piece ? layout | LAYOUT_LATER : layout, upstream, &action);
	if (!is_sent(verdict))
		count_aside(skb, 0, 0, upstream & ~RECIRCULATED_OWN, verdict);
	return action;
}

#endif
