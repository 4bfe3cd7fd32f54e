/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path: plain datagrams to upstreams that this CPU remembers. It sends a packet, or leaves it as it
 * arrived to the slow path, which decides about everything else and fills the lines.
 */
#ifndef UDPLB_FAST_H
#define UDPLB_FAST_H

/*
 * Sends the packet itself, which has no tag, to the upstream of a valid line, and counts its sender in a
 * table, if it has one. Returns ACTION_SLOW if the packet is left as it is.
 */
static __always_inline int send_plain(struct __sk_buff *skb, struct pkt *pkt, struct line *line, __u32 index,
				      __u32 sender_table, const bool ipv6)
{
	struct rewrite rw;
	const __be32 *destination = fill_plain_rewrite(pkt, line, index, ipv6, &rw);

	if (unlikely(!destination))
		return ACTION_SLOW;
	count_plain_sender(pkt, sender_table, skb->len);
	rewrite_plain(skb, pkt, &rw, destination, line->macs);
	count_sent(line, 1, skb->len);
	return redirect_plain(line->ifindex);
}

/*
 * Sends a clone of a plain packet by a line, and restores the packet. Returns enum copied. The caller counts
 * failures: the stack of 5.10 has no room for another call from here.
 */
static __always_inline __u32 clone_plain(struct __sk_buff *skb, struct pkt *pkt, struct line *line,
					 const struct rewrite *rw, const __be32 *destination, const bool ipv6)
{
	struct headers saved6;
	struct saved4 saved;
	bool failed;
	__u32 delta;

	if (ipv6)
		save_headers(skb, pkt, &saved6);
	else
		save_plain4(pkt, &saved);
	delta = rewrite_plain(skb, pkt, rw, destination, line->macs);
	failed = bpf_clone_redirect(skb, line->ifindex, 0);
	if (!failed)
		count_sent(line, 1, skb->len);
	if (delta)
		bpf_csum_update(skb, ~delta);
	if (!locate_plain(skb, pkt, ipv6))
		return COPIED_BROKEN;
	if (ipv6)
		restore_headers(skb, pkt, &saved6);
	else
		restore_plain4(pkt, &saved);
	return failed ? COPIED_NOT : COPIED_SENT;
}

/* Sends a clone to an upstream whose line has just been valid. Returns as clone_plain(). */
static __always_inline __u32 copy_plain(struct __sk_buff *skb, __u32 index, const bool ipv6)
{
	struct line *line = get_line(index);
	const __be32 *destination;
	struct rewrite rw;
	struct pkt pkt;

	if (!line || !locate_plain(skb, &pkt, ipv6) ||
	    !(destination = fill_plain_rewrite(&pkt, line, index, ipv6, &rw)))
		return COPIED_NOT;
	return clone_plain(skb, &pkt, line, &rw, destination, ipv6);
}

/* Global functions, which the verifier explores once and not in each round of a loop. */
__noinline __u32 copy_plain4(struct __sk_buff *skb, __u32 index)
{
	return copy_plain(skb, index, false);
}

__noinline __u32 copy_plain6(struct __sk_buff *skb, __u32 index)
{
	return features.ipv6 ? copy_plain(skb, index, true) : COPIED_NOT;
}

static __always_inline bool can_copy(const struct pkt *pkt, __u32 index, const bool ipv6)
{
	const struct line *line = get_line(index);
	struct rewrite rw;

	return line && serves(line, pkt) && fill_plain_rewrite(pkt, line, index, ipv6, &rw);
}

/* Returns true if the line of an upstream is valid for an IPv6 packet. */
__noinline __u32 has_valid_line6(struct __sk_buff *skb, __u32 index)
{
	struct pkt pkt;

	return features.ipv6 && locate_plain(skb, &pkt, true) && can_copy(&pkt, index, true);
}

/* Returns true if the lines of so many adjacent upstreams are valid for an IPv4 packet. */
static __always_inline bool have_valid_lines4(struct __sk_buff *skb, __u32 first, __u32 receivers)
{
	struct pkt pkt;
	__u32 i;

	if (!locate_plain(skb, &pkt, false))
		return false;
	for (i = 0; i < MAX_RECEIVERS && i < receivers; i++) {
		if (!can_copy(&pkt, first + i, false))
			return false;
		if (!features.receivers)
			break; /* there is only one */
	}
	return true;
}

/* As have_valid_lines4(), with a call for each upstream: the verifier would explore a loop for long. */
static __always_inline bool have_valid_lines6(struct __sk_buff *skb, __u32 first, __u32 receivers)
{
	__u32 i;

	for (i = 0; i < MAX_RECEIVERS && i < receivers; i++) {
		if (!has_valid_line6(skb, first + i))
			return false;
		if (!features.receivers)
			break;
	}
	return true;
}

/* Returns true if the lines of so many adjacent upstreams are valid for the packet. */
static __always_inline __u32 have_valid_lines(struct __sk_buff *skb, __u32 first, __u32 receivers, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? have_valid_lines6(skb, first, receivers)
				     : have_valid_lines4(skb, first, receivers);
}

/*
 * Sends a clone of a plain packet without a tag to an upstream, and counts the packet under the id of a rule
 * that replicates (0: none). Returns the action of the program, or ACTION_SLOW.
 */
static __always_inline int pass_plain(struct __sk_buff *skb, struct pkt *pkt, __u32 index, __u32 rule,
				      const bool ipv6)
{
	struct line *line = get_line(index);
	const __be32 *destination;
	struct rewrite rw;
	__u32 copied;

	if (!line || !serves(line, pkt) || !(destination = fill_plain_rewrite(pkt, line, index, ipv6, &rw)))
		return ACTION_SLOW;
	copied = clone_plain(skb, pkt, line, &rw, destination, ipv6);
	if (copied == COPIED_NOT)
		count_not_copied(skb, index);
	if (rule)
		count_verdict(skb, PKT_UNKNOWN, 0, rule,
			      copied == COPIED_NOT ? VERDICT_CLONE_FAILED : VERDICT_FORWARDED);
	return copied == COPIED_BROKEN ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* A global function, for the stack of the fast path. */
__noinline int pass_plain6(struct __sk_buff *skb, __u32 index)
{
	struct pkt pkt;

	if (!features.copies || !features.ipv6 || !locate_plain(skb, &pkt, true))
		return ACTION_SLOW;
	return pass_plain(skb, &pkt, index, 0, true);
}

/* As pass_plain() for IPv4, a global function, for the stack of the fast path. */
__noinline int pass_to_receiver4(struct __sk_buff *skb, __u32 index, __u32 rule)
{
	struct pkt pkt;

	if (!features.copies || !locate_plain(skb, &pkt, false))
		return ACTION_SLOW;
	return pass_plain(skb, &pkt, index, rule, false);
}

static __always_inline int send_itself(struct __sk_buff *skb, __u32 index, const bool ipv6)
{
	struct line *line = get_line(index);
	struct pkt pkt;

	if (!line || !locate_plain(skb, &pkt, ipv6))
		return ACTION_SLOW;
	return send_plain(skb, &pkt, line, index, 0, ipv6);
}

/* Sends the packet itself to the last receiver, whose line has just been valid. */
__noinline int send_last(struct __sk_buff *skb, __u32 index, __u32 ipv6)
{
	int action = features.ipv6 && ipv6 ? send_itself(skb, index, true) : send_itself(skb, index, false);

	return action == ACTION_SLOW ? TC_ACT_SHOT : action;
}

/* Pops the tag that the skb holds, if this host is in its VLAN. */
static __always_inline bool pop_own_tag(struct __sk_buff *skb)
{
	return is_for_us_tagged(skb, 0) && !bpf_skb_vlan_pop(skb);
}

/* Sends the packet itself to an upstream as send_plain(), without the tag that the skb holds. */
__noinline int send_tagged(struct __sk_buff *skb, __u32 index, __u32 sender_table, __u32 ipv6)
{
	int action;

	barrier_var(sender_table); /* else callers in the small object leave a pointer in its register */
	if (!have_valid_lines(skb, index, 1, ipv6) || !pop_own_tag(skb))
		return ACTION_SLOW;
	if (sender_table && EXTRA(sender_tables))
		count_rule_sender(skb, plain_packed(ipv6), sender_table);
	action = send_last(skb, index, ipv6);
	if (action == TC_ACT_SHOT)
		count_not_copied(skb, index);
	return action;
}

/*
 * Sends clones of a plain packet to all upstreams of xmit->copies, to all or to none: the slow path would
 * send to all again. Returns the action of the program, or ACTION_SLOW.
 */
__noinline int copy_to_all(struct __sk_buff *skb)
{
	__u32 tagged = skb->vlan_present, i, copied = COPIED_SENT;
	const struct xmit *xmit = get_xmit();
	__be16 protocol = skb->vlan_proto;
	__u16 control = skb->vlan_tci;
	struct copies copies;
	__u32 sent;
	int action;

	if (!xmit)
		return ACTION_SLOW;
	/* a clone that this host receives may run the program before this ends */
	copies = xmit->copies;
	if (!have_valid_lines(skb, copies.first, copies.receivers, copies.ipv6) ||
	    (tagged && !pop_own_tag(skb)))
		return ACTION_SLOW;
	if (EXTRA(sender_tables) && copies.sender_table)
		count_rule_sender(skb, plain_packed(copies.ipv6), copies.sender_table);
	sent = copies.block;
	for (i = 0; i < MAX_RECEIVERS && i + copies.block < copies.receivers; i++) {
		copied =
			copies.ipv6 ? copy_plain6(skb, copies.first + i) : copy_plain4(skb, copies.first + i);
		if (copied == COPIED_BROKEN)
			break;
		if (copied == COPIED_NOT)
			count_not_copied(skb, copies.first + i);
		sent |= copied & COPIED_SENT; /* without a branch, whose ways the verifier would follow */
		if (!features.receivers)
			break;
	}
	if (copies.rule)
		count_verdict(skb, PKT_UNKNOWN, 0, copies.rule,
			      sent ? VERDICT_FORWARDED : VERDICT_CLONE_FAILED);
	if (copied == COPIED_BROKEN)
		return TC_ACT_SHOT;
	if (copies.block) {
		action = send_last(skb, copies.first + copies.receivers - 1, copies.ipv6);
		if (action == TC_ACT_SHOT)
			count_not_copied(skb, copies.first + copies.receivers - 1);
		return action;
	}
	return tagged && bpf_skb_vlan_push(skb, protocol, control) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* Leaves a packet to copy_to_all(), which needs the stack of the caller. */
static __always_inline int leave_copies(struct copies copies)
{
	struct xmit *xmit = get_xmit();

	if (!features.copies || !xmit)
		return ACTION_SLOW;
	xmit->copies = copies;
	return ACTION_COPY;
}

/* Returns the index of the upstream that headers or chance select; ~0 without one. */
static __always_inline __u32 balance_plain(const struct pkt *pkt, const struct rule *rule)
{
	__u32 key = rule->strategy == STRATEGY_RANDOM ? bpf_get_prandom_u32() : header_key(pkt, rule);

	return slot_index(rule->first_slot + key % rule->slots, rule->first_upstream);
}

/* Sends clones of a plain packet to all receivers of a rule, or leaves them to copy_to_all(). */
static __always_inline int replicate_plain(struct __sk_buff *skb, const struct rule *rule, const bool ipv6)
{
	struct copies copies = {
		.first = rule->first_receiver,
		.receivers = rule->receivers,
		.rule = rule->id,
		.block = rule->action == ACTION_BLOCK,
		.ipv6 = ipv6,
		.sender_table = rule->sender_table,
	};

	if (!ipv6 && rule->receivers == 1 && rule->action == ACTION_PASS && !rule->sender_table &&
	    !skb->vlan_present)
		return pass_to_receiver4(skb, rule->first_receiver, rule->id);
	return leave_copies(copies);
}

/* Sends a clone of a plain packet to an upstream. */
static __always_inline int deliver_pass(struct __sk_buff *skb, struct pkt *pkt, __u32 index,
					__u32 sender_table, const bool ipv6)
{
	struct copies copies = {
		.first = index,
		.receivers = 1,
		.ipv6 = ipv6,
		.sender_table = sender_table,
	};

	if (skb->vlan_present || sender_table)
		return leave_copies(copies);
	return ipv6 ? pass_plain6(skb, index) : pass_plain(skb, pkt, index, 0, false);
}

/* Sends a plain packet to an upstream that gets it by its MAC address or in a tunnel. */
static __always_inline int deliver_direct(struct __sk_buff *skb, __u32 index, __u32 sender_table,
					  const bool ipv6)
{
	if (skb->vlan_present && !is_for_us_tagged(skb, 0))
		return ACTION_SLOW;
	return ipv6 ? send_direct6(skb, index, sender_table) : send_direct4(skb, index, sender_table);
}

/* Processes a plain datagram of a key's entry. */
static __always_inline int deliver_plain(struct __sk_buff *skb, struct pkt *pkt, __u32 entry, const bool ipv6)
{
	__u32 index = entry & ENTRY_INDEX, kind = entry & ~ENTRY_INDEX, sender_table = 0;
	const __u32 length = total_length(pkt);
	const struct rule *rule;
	struct line *line;

	if (unlikely(kind != ENTRY_BLOCK)) {
		if (kind == ENTRY_FLOW && EXTRA(flows))
			return ipv6 ? send_question6(skb, index) : send_question4(skb, index);
		if (kind == ENTRY_RULE || kind == ENTRY_FLOW)
			return ACTION_SLOW;
	}
	if (unlikely(!is_plain_in_vlan(skb, pkt, ipv6)))
		return ACTION_SLOW;
	if (unlikely(kind != ENTRY_BLOCK && kind != ENTRY_PASS)) {
		rule = bpf_map_lookup_elem(&rules, &index);
		if (!rule)
			return ACTION_SLOW;
		if (kind == ENTRY_REPLICATE)
			return replicate_plain(skb, rule, ipv6);
		if (EXTRA(templates) && rule->flags & RULE_TEMPLATES &&
		    has_template_set(skb, pkt_l4_offset(pkt) + sizeof(struct udphdr),
				     bpf_ntohs(pkt->udp->len) - sizeof(struct udphdr)))
			return ACTION_SLOW;
		index = balance_plain(pkt, rule);
		sender_table = rule->sender_table;
		kind = rule->action == ACTION_BLOCK ? ENTRY_BLOCK : ENTRY_PASS;
	}
	if (unlikely(kind == ENTRY_PASS))
		return features.copies ? deliver_pass(skb, pkt, index, sender_table, ipv6) : ACTION_SLOW;
	line = get_line(index);
	if (unlikely(!line || !is_line_valid(line, length)))
		return ACTION_SLOW;
	if (unlikely(line->via && EXTRA(direct)))
		return deliver_direct(skb, index, sender_table, ipv6);
	if (unlikely(skb->vlan_present))
		return send_tagged(skb, index, sender_table, ipv6);
	return send_plain(skb, pkt, line, index, sender_table, ipv6);
}

/*
 * Returns the action for a datagram without a rule: the slow path translates answers, and reports the others
 * while somebody listens.
 */
static __always_inline int leave_stranger(const struct pkt *pkt, const bool ipv6)
{
	const void *source = ipv6 ? (void *)&pkt->ip6->saddr : (void *)&pkt->ip->saddr;

	if (EXTRA(any_port) || tracing.until)
		return ACTION_SLOW;
	return EXTRA(origins) && find_origin(source, pkt->udp->source, ipv6) ? ACTION_SLOW : TC_ACT_UNSPEC;
}

static __always_inline int fast_ipv4(struct __sk_buff *skb, struct pkt *pkt)
{
	const struct iphdr *ip = pkt->ip;
	__u32 entry;
	int action;

	if (unlikely(ip->protocol != IPPROTO_UDP))
		return ip->protocol == IPPROTO_ICMP ? ACTION_SLOW : TC_ACT_UNSPEC;
	if (unlikely(*(const __u8 *)ip != 0x45 || ip->frag_off & bpf_htons(IP_OFFSET | IP_MF) ||
		     skb->cb[CB_MAGIC] == RECIRCULATE_MAGIC))
		return ACTION_SLOW;
	if (EXTRA(flows) && is_flow_port(pkt->udp->dest)) {
		action = send_answer4(skb);
		if (action != ACTION_NO_ANSWER)
			return action;
		if (!locate_plain(skb, pkt, false))
			return ACTION_SLOW;
		ip = pkt->ip;
	}
	entry = find_entry(ip->daddr, pkt->udp->dest);
	return likely(entry) ? deliver_plain(skb, pkt, entry, false) : leave_stranger(pkt, false);
}

static __always_inline int fast_ipv6(struct __sk_buff *skb, struct pkt *pkt)
{
	const struct ipv6hdr *ip6;
	__u32 entry;
	int action;

	if (!locate_plain(skb, pkt, true))
		return ACTION_SLOW;
	ip6 = pkt->ip6;
	if (ip6->nexthdr != IPPROTO_UDP)
		return ip6->nexthdr == IPPROTO_ICMPV6 || is_extension_header(ip6->nexthdr) ? ACTION_SLOW
											   : TC_ACT_UNSPEC;
	if (ip6->version != 6 || skb->cb[CB_MAGIC] == RECIRCULATE_MAGIC)
		return ACTION_SLOW;
	if (EXTRA(flows) && is_flow_port(pkt->udp->dest)) {
		action = send_answer6(skb);
		if (action != ACTION_NO_ANSWER)
			return action;
		if (!locate_plain(skb, pkt, true))
			return ACTION_SLOW;
		ip6 = pkt->ip6;
	}
	entry = find_entry6(ip6->daddr.in6_u.u6_addr32, pkt->udp->dest);
	return likely(entry) ? deliver_plain(skb, pkt, entry, true) : leave_stranger(pkt, true);
}

/*
 * Processes a packet behind an Ethernet header. Returns the action of the program, ACTION_COPY or
 * ACTION_SLOW.
 */
static __always_inline int fast(struct __sk_buff *skb)
{
	struct pkt pkt;
	__be16 protocol;

	if (unlikely(!locate_plain(skb, &pkt, false)))
		return ACTION_SLOW;
	protocol = ((const __be16 *)pkt.ip)[-1]; /* of the Ethernet header, as one word */
	if (likely(protocol == bpf_htons(ETH_P_IP)))
		return fast_ipv4(skb, &pkt);
	if (features.ipv6 && protocol == bpf_htons(ETH_P_IPV6))
		return fast_ipv6(skb, &pkt);
	return is_vlan_ethertype(protocol) ? ACTION_SLOW : TC_ACT_UNSPEC;
}

#endif
