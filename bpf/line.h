/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Lines: the next hop that this CPU remembers of an upstream. The slow path fills them with the epoch that it
 * read before it decided, so that a change in between invalidates them. Only one CPU reads and writes a line.
 */
#ifndef UDPLB_LINE_H
#define UDPLB_LINE_H

#define LINES_PER_SECOND 10 /* how often a next hop is asked for without the lease */

/* Returns true while a line may be used for an IP packet of `length` bytes. */
static __always_inline bool is_line_valid(const struct line *line, __u32 length)
{
	return is_fresh(line->epoch, line->until) && length <= line->mtu;
}

/*
 * Returns until when a next hop may be remembered, in jiffies; 0: not at all. Under the lease it is asked for
 * again each second, because of path MTUs. Without it, ten times a second, and only if it serves all packets.
 */
static __always_inline __u64 line_expiry(const struct xmit *xmit)
{
	const struct nexthop_slot *slot = nexthop_slot(xmit->upstream);
	__u64 now = bpf_jiffies64(), until = now + features.ticks_per_second, lease;
	const struct nexthop *cached;

	if (xmit->leased) {
		lease = lease_end();
		return lease < until ? lease : until;
	}
	if (!slot)
		return 0;
	cached = cached_nexthop(slot, sequence_of(slot), xmit->rewrite.destination);
	if (!cached || !cached->ifindex || cached->by_packet)
		return 0;
	return now + features.ticks_per_second / LINES_PER_SECOND;
}

/* Returns the MTU of xmit->hop that may be remembered for packets like one of `length` bytes. */
static __always_inline __u16 remembered_mtu(const struct xmit *xmit, __u32 length, bool ipv6)
{
	__u16 mtu = xmit->hop.mtu ?: 0xffff;

	/* path MTUs are looked up for larger packets only */
	return length <= min_pmtu(ipv6) && mtu > min_pmtu(ipv6) ? min_pmtu(ipv6) : mtu;
}

/* Returns true if the device with this index sends frames that XDP redirects to it. */
static __always_inline bool takes_frames(__u32 ifindex)
{
	const struct device *device = features.xdp ? bpf_map_lookup_elem(&devices, &ifindex) : NULL;

	return device && device->takes_frames;
}

/* Returns true while the upstream of a packet has a line for an IP packet of `length` bytes. */
static __always_inline bool is_remembered(const struct xmit *xmit, __u32 length)
{
	const struct line *line = get_line(xmit->index);

	return line && is_line_valid(line, length);
}

/*
 * Remembers the next hop in xmit->hop of an upstream, for packets like the current one: an IP packet of
 * `length` bytes. Not while anybody traces, so that the slow path sees all packets.
 */
__noinline __u32 fill_line(__u32 length, __u32 ipv6)
{
	struct xmit *xmit = get_xmit();
	const struct upstream *upstream;
	const __be32 *source;
	__u32 index, outer;
	struct line *line;
	__u64 until;

	if (!xmit || !xmit->hop.resolved || features.dry_run || is_tracing())
		return 0;
	index = xmit->index;
	line = get_line(index);
	upstream = bpf_map_lookup_elem(&upstreams, &index);
	until = line_expiry(xmit);
	if (!line || !upstream || !until)
		return 0;
	/* the fast path replaces the source ports of flows alone */
	if (xmit->rewrite.source_port && upstream->source != SOURCE_FLOW)
		return 0;
	outer = outer_length(xmit, ipv6);
	line->until = until;
	line->ifindex = xmit->hop.ifindex;
	line->mtu = remembered_mtu(xmit, length + outer, ipv6) - outer;
	line->port = upstream->port;
	line->source = upstream->source;
	line->takes_frames = takes_frames(line->ifindex);
	line->via = upstream->via;
	line->down = EXTRA(flows) && is_down(upstream);
	copy_macs(line->macs, xmit->hop.macs);
	source = outer ? xmit->egress : xmit->rewrite.source;
	if (features.ipv6 && ipv6) {
		__builtin_memcpy(line->source6, source, sizeof(line->source6));
	} else {
		line->destination = upstream->address[0];
		line->source4 = source[0];
	}
	line->epoch = xmit->epoch;
	return 0;
}

#endif
