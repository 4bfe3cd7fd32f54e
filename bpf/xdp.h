/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path before there is an skb: plain datagrams to one upstream, of rules with ACTION_BLOCK, by the
 * lines that the program at tc fills. All else passes on to tc as it came.
 */
#ifndef UDPLB_XDP_H
#define UDPLB_XDP_H

static __always_inline bool locate_frame(struct xdp_md *xdp, struct pkt *pkt, const bool ipv6)
{
	return locate_headers((void *)(long)xdp->data, (void *)(long)xdp->data_end, pkt, ipv6);
}

/*
 * Returns true if the field of the UDP checksum holds the sum of the pseudo-header, as in packets of virtual
 * senders, and in those that GRO has merged: a device is to compute the rest, and XDP cannot ask for that.
 * One in 65,536 checksums is the same by chance.
 */
static __always_inline bool is_partial(const struct pkt *pkt, const bool ipv6)
{
	__u64 sum = (__u64)pkt->udp->len + bpf_htons(IPPROTO_UDP);
	const __u32 *addresses = ipv6 ? (const void *)&pkt->ip6->saddr : (const void *)&pkt->ip->saddr;
	int word;

#pragma unroll
	for (word = 0; word < (ipv6 ? 8 : 2); word++)
		sum += addresses[word];
	return fold16(sum) == pkt->udp->check;
}

static __always_inline void count_xdp_sent(void)
{
	__u32 only = 0;
	__u64 *sent = bpf_map_lookup_elem(&xdp_sent, &only);

	if (sent)
		++*sent;
}

/*
 * Returns the line of the upstream of a plain datagram, and stores the table of its sender; NULL unless XDP
 * may send it there.
 */
static __always_inline struct line *xdp_line(const struct pkt *pkt, __u32 entry, const struct device *device,
					     __u32 *index, __u32 *sender_table)
{
	const struct rule *rule;
	struct line *line;

	*index = entry & ENTRY_INDEX;
	*sender_table = 0;
	switch (entry & ~ENTRY_INDEX) {
	case ENTRY_BLOCK:
		break;
	case ENTRY_BALANCE:
		rule = bpf_map_lookup_elem(&rules, index);
		if (!rule || rule->action != ACTION_BLOCK ||
		    (EXTRA(templates) && rule->flags & RULE_TEMPLATES))
			return NULL;
		*index = balance_plain(pkt, rule);
		*sender_table = rule->sender_table;
		break;
	default:
		return NULL;
	}
	line = get_line(*index);
	if (!line || !serves(line, pkt) || !(device->generic || line->takes_frames) ||
	    (line->via > VIA_LINK && EXTRA(direct)))
		return NULL;
	return line;
}

/* Rewrites a datagram for the upstream of a line, and counts its sender. Returns false if it stays as it is.
 */
static __always_inline bool rewrite_frame(struct pkt *pkt, const struct line *line, __u32 index,
					  __u32 sender_table, __u64 bytes, const bool ipv6)
{
	const __be32 *destination;
	struct rewrite rw;

	if (unlikely(line->via && EXTRA(direct))) {
		if (!is_from_another(pkt, line_address(line, index, ipv6), ipv6))
			return false;
		count_plain_sender(pkt, sender_table, bytes);
		lower_ttl(pkt, ipv6);
	} else {
		destination = fill_plain_rewrite(pkt, line, index, ipv6, &rw);
		if (unlikely(!destination))
			return false;
		count_plain_sender(pkt, sender_table, bytes);
		rewrite_headers(NULL, pkt, CSUM_FULL, &rw, destination);
	}
	copy_macs(pkt->eth, line->macs);
	return true;
}

/* Sends a datagram of a key's entry, or passes it on. */
static __always_inline int xdp_deliver(struct xdp_md *xdp, struct pkt *pkt, __u32 entry, const bool ipv6)
{
	__u64 bytes = (void *)(long)xdp->data_end - (void *)(long)xdp->data;
	__u32 ifindex = xdp->ingress_ifindex, index, sender_table;
	const struct device *device = bpf_map_lookup_elem(&devices, &ifindex);
	struct line *line;

	if (unlikely(!entry || !device || !is_same_mac(pkt->eth->h_dest, device->mac) ||
		     !is_usual(bytes, pkt, ipv6) || is_partial(pkt, ipv6)))
		return XDP_PASS;
	line = xdp_line(pkt, entry, device, &index, &sender_table);
	if (unlikely(!line) || !rewrite_frame(pkt, line, index, sender_table, bytes, ipv6))
		return XDP_PASS;
	count_sent(line, 1, bytes);
	count_xdp_sent();
	return bpf_redirect(line->ifindex, 0);
}

/* Returns true for packets to a port that the program at tc has to look at before rules. */
static __always_inline bool is_for_tc(__be16 port)
{
	return (EXTRA(flows) && is_flow_port(port)) ||
	       (port == bpf_htons(GUE_PORT) && EXTRA(decap) && decap_settings.gue);
}

static __always_inline int xdp_ipv4(struct xdp_md *xdp, struct pkt *pkt)
{
	const struct iphdr *ip = pkt->ip;

	if (ip->protocol != IPPROTO_UDP || *(const __u8 *)ip != 0x45 ||
	    ip->frag_off & bpf_htons(IP_OFFSET | IP_MF) || is_for_tc(pkt->udp->dest))
		return XDP_PASS;
	return xdp_deliver(xdp, pkt, find_entry(ip->daddr, pkt->udp->dest), false);
}

static __always_inline int xdp_ipv6(struct xdp_md *xdp, struct pkt *pkt)
{
	const struct ipv6hdr *ip6 = pkt->ip6;

	if (!locate_frame(xdp, pkt, true) || ip6->nexthdr != IPPROTO_UDP || ip6->version != 6 ||
	    is_for_tc(pkt->udp->dest))
		return XDP_PASS;
	return xdp_deliver(xdp, pkt, find_entry6(ip6->daddr.in6_u.u6_addr32, pkt->udp->dest), true);
}

static __always_inline int run_xdp(struct xdp_md *xdp)
{
	struct pkt pkt;
	__be16 protocol;

	if (!locate_frame(xdp, &pkt, false))
		return XDP_PASS;
	protocol = *(const __be16 *)&pkt.eth->h_proto;
	if (likely(protocol == bpf_htons(ETH_P_IP)))
		return xdp_ipv4(xdp, &pkt);
	if (features.ipv6 && protocol == bpf_htons(ETH_P_IPV6))
		return xdp_ipv6(xdp, &pkt);
	return XDP_PASS;
}

#endif
