/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The packet itself goes out: to a MAC address that is known, or by the kernel's neighbour table. */
#ifndef UDPLB_REDIRECT_H
#define UDPLB_REDIRECT_H

/*
 * Ends CHECKSUM_COMPLETE, which no other helper does. bpf_redirect_neigh() takes a header off and leaves it
 * in the sum; a receiver on this host then takes another one out of it, and drops the packet if the sum is
 * not the hardware's: behind a tunnel it is not.
 */
static __always_inline void forget_sum(struct __sk_buff *skb)
{
	__u32 length = skb->len;

	if (!skb->gso_size && !bpf_skb_change_tail(skb, length + 1, 0))
		bpf_skb_change_tail(skb, length, 0);
}

/* Redirects the packet, whose headers have been rewritten already. */
static __always_inline int give(struct __sk_buff *skb, struct sending *sending)
{
	struct bpf_redir_neigh *neighbour = &sending->neighbour;
	const struct way *way = &sending->way;

	if (way->resolved)
		return bpf_redirect(way->ifindex, 0);
	if (sending->checksum == CHECKSUM_OF_FRAME)
		forget_sum(skb);
	/* the kernel asks for the neighbour and keeps the packet meanwhile */
	neighbour->nh_family = way->family;
	__builtin_memcpy(neighbour->ipv6_nh, way->gateway, sizeof(neighbour->ipv6_nh));
	return bpf_redirect_neigh(way->ifindex, neighbour, sizeof(*neighbour), 0);
}

#endif
