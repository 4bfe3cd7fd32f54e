/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Redirects the packet itself: to a known MAC address, or through the kernel's neighbour table. */
#ifndef UDPLB_REDIRECT_H
#define UDPLB_REDIRECT_H

/*
 * Resets CHECKSUM_COMPLETE, by the only helper that does. bpf_redirect_neigh() removes the Ethernet header
 * but not its share of skb->csum. A receiver on this host then subtracts that share again, and drops the
 * packet when the result does not match the hardware's sum, as behind a tunnel.
 */
static __always_inline void drop_csum_complete(struct __sk_buff *skb)
{
	__u32 length = skb->len;

	if (!skb->gso_size && !bpf_skb_change_tail(skb, length + 1, 0))
		bpf_skb_change_tail(skb, length, 0);
}

/* Redirects the packet itself. Its headers have been rewritten already. */
static __always_inline int redirect(struct __sk_buff *skb, struct xmit *xmit)
{
	struct bpf_redir_neigh *neighbour = &xmit->neighbour;
	const struct hop *hop = &xmit->hop;

	if (hop->resolved)
		return bpf_redirect(hop->ifindex, 0);
	if (xmit->checksum == CSUM_COMPLETE)
		drop_csum_complete(skb);
	/* the kernel resolves the neighbour and queues the packet meanwhile */
	neighbour->nh_family = hop->family;
	__builtin_memcpy(neighbour->ipv6_nh, hop->gateway, sizeof(neighbour->ipv6_nh));
	return bpf_redirect_neigh(hop->ifindex, neighbour, sizeof(*neighbour), 0);
}

#endif
