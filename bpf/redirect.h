/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The packet itself goes out: to a MAC address that is known, or by the kernel's neighbour table. */
#ifndef UDPLB_REDIRECT_H
#define UDPLB_REDIRECT_H

/*
 * Ends CHECKSUM_COMPLETE, which no other helper does. bpf_redirect_neigh() takes a header off and leaves it
 * in the sum; a receiver on this host then takes another one out of it, and drops the packet if the sum is
 * not the hardware's: behind a tunnel it is not.
 */
static __always_inline void drop_csum_complete(struct __sk_buff *skb)
{
	__u32 length = skb->len;

	if (!skb->gso_size && !bpf_skb_change_tail(skb, length + 1, 0))
		bpf_skb_change_tail(skb, length, 0);
}

/* Redirects the packet, whose headers have been rewritten already. */
static __always_inline int redirect(struct __sk_buff *skb, struct xmit *xmit)
{
	struct bpf_redir_neigh *neighbour = &xmit->neighbour;
	const struct hop *hop = &xmit->hop;

	if (hop->resolved)
		return bpf_redirect(hop->ifindex, 0);
	if (xmit->checksum == CSUM_COMPLETE)
		drop_csum_complete(skb);
	/* the kernel asks for the neighbour and keeps the packet meanwhile */
	neighbour->nh_family = hop->family;
	__builtin_memcpy(neighbour->ipv6_nh, hop->gateway, sizeof(neighbour->ipv6_nh));
	return bpf_redirect_neigh(hop->ifindex, neighbour, sizeof(*neighbour), 0);
}

#endif
