// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The path of a packet: parse, match, admit, select, deliver. */
#include "udplb.h"
#include "parse.h"
#include "siphash.h"
#include "match.h"
#include "rewrite.h"
#include "ipfrag.h"
#include "epoch.h"
#include "pmtu.h"
#include "lease.h"
#include "nexthop.h"
#include "trace.h"
#include "count.h"
#include "lb.h"
#include "quic.h"
#include "templates.h"
#include "flow.h"
#include "senders.h"
#include "redirect.h"
#include "vlan.h"
#include "fragmentation.h"
#include "recirculate.h"
#include "handover.h"
#include "tunnel.h"
#include "line.h"
#include "return_line.h"
#include "xmit.h"
#include "here.h"
#include "icmp.h"
#include "admit.h"
#include "deliver.h"
#include "slowpath.h"
#include "pmtu_discovery.h"
#include "icmp_answers.h"
#include "decap.h"
#include "plain.h"
#include "flow_fast.h"
#include "direct.h"
#include "fast.h"
#include "xdp.h"

/* Processes a whole datagram of a rule, behind an Ethernet header without VLAN tags. */
static __always_inline int process(struct __sk_buff *skb, struct pkt *pkt, const struct rule *rule)
{
	struct selection selection = {};
	enum verdict verdict;

	trace(skb, rule->id, pkt);
	verdict = admit(skb, pkt->packed, rule->id, rule->flags);
	if (verdict == VERDICT_FORWARDED && EXTRA(sender_tables) && rule->sender_table)
		count_rule_sender(skb, pkt->packed, rule->sender_table);
	if (verdict == VERDICT_FORWARDED)
		verdict = select_targets(skb, pkt, rule, &selection);
	if (verdict != VERDICT_FORWARDED)
		return refuse(skb, pkt, rule, verdict);
	return deliver(skb, pkt, rule, &selection);
}

/* Processes a whole answer of an upstream; `index` is that of its answers in `upstreams`. */
static __always_inline int process_answer(struct __sk_buff *skb, struct pkt *pkt, const struct rule *rule,
					  __u32 index)
{
	enum verdict verdict;

	trace(skb, rule->id, pkt);
	verdict = admit_answer(skb, pkt->packed, rule->flags);
	if (verdict != VERDICT_FORWARDED)
		return refuse_answer(skb, pkt, index, verdict);
	return deliver_answer(skb, pkt, rule, index, 0);
}

/* Returns the rule whose upstream answers with a packet, and stores the index of its answers; NULL: none. */
static __always_inline const struct rule *answered_rule(const struct pkt *pkt, __u32 *index)
{
	if (pkt_has(pkt, PKT_F_IPV6))
		return match_answer(&pkt->ip6->saddr, &pkt->ip6->daddr, pkt->udp->source, true, index);
	return match_answer(&pkt->ip->saddr, &pkt->ip->daddr, pkt->udp->source, false, index);
}

/*
 * The slow path, for any packet; `l2` is the length in bytes of the link-layer header: Ethernet's, or 0.
 * Returns the action of the program, or ACTION_RARE.
 */
static __always_inline int run(struct __sk_buff *skb, const __u32 l2)
{
	struct xmit *xmit = get_xmit();
	const struct rule *rule;
	bool is_answer = false;
	__u32 answers = 0;
	struct pkt pkt;
	int action;

	if (!xmit)
		return TC_ACT_UNSPEC;
	xmit->epoch = current_epoch();
	if (skb->cb[CB_MAGIC] == RECIRCULATE_MAGIC && (action = resume_recirculated(skb, l2)) != ACTION_NONE)
		return action;
	switch (parse(skb, l2, &pkt)) {
	case PARSED_IPV4:
		rule = match(&pkt.ip->saddr, &pkt.ip->daddr, pkt.udp->dest, false);
		pkt.packed = sizeof(struct ethhdr) + pkt.ip->ihl * 4;
		break;
	case PARSED_IPV6:
		rule = match(&pkt.ip6->saddr, &pkt.ip6->daddr, pkt.udp->dest, true);
		pkt.packed = PKT_F_IPV6 | (sizeof(struct ethhdr) + sizeof(struct ipv6hdr));
		break;
	case PARSED_ICMP:
		learn_pmtu(skb, l2);
		return l2 && forwards_errors() ? ACTION_ERROR : TC_ACT_UNSPEC;
	case PARSED_SLOWPATH:
		return ACTION_RARE;
	default:
		return TC_ACT_UNSPEC;
	}
	if (EXTRA(flows) && is_flow_port(pkt.udp->dest)) {
		if (!l2 || skb->vlan_present)
			return ACTION_RARE;
		answers = is_for_us(skb) ? find_answered_pkt(skb, pkt.packed) : 0;
		if (answers) {
			rule = rule_of_upstream(--answers);
			is_answer = true;
		}
	}
	if (EXTRA(origins) && !rule) {
		rule = answered_rule(&pkt, &answers);
		is_answer = true;
	}
	if (!rule) {
		leave_unmatched(skb, l2, l2, l2 - sizeof(struct ethhdr) + pkt_l4_offset(&pkt),
				pkt_has(&pkt, PKT_F_IPV6));
		return TC_ACT_UNSPEC;
	}
	if (!l2 || skb->vlan_present)
		return ACTION_RARE;
	if (!is_for_us(skb)) {
		if (!is_answer)
			count_pkt(skb, &pkt, rule->id, VERDICT_NOT_FOR_US);
		return TC_ACT_UNSPEC;
	}
	action = is_answer ? process_answer(skb, &pkt, rule, answers) : process(skb, &pkt, rule);
	return action == ACTION_REFLECT ? bpf_redirect(skb->ifindex, 0) : action;
}

/* A global function, so that the fast path does not set up its stack frame. */
__noinline int slow(struct __sk_buff *skb)
{
	return run(skb, sizeof(struct ethhdr));
}

SEC("tc")
int udplb(struct __sk_buff *skb)
{
	int action;

	if (EXTRA(decap) && may_have_outer(skb, sizeof(struct ethhdr)) && decap(skb, sizeof(struct ethhdr)))
		return TC_ACT_UNSPEC;
	action = fast(skb);
	/* all actions of the kernel are smaller */
	if (action < ACTION_SLOW)
		return action;
	if (features.copies && action == ACTION_COPY)
		action = copy_to_all(skb);
	if (action == ACTION_SLOW)
		action = slow(skb);
	if (action == ACTION_ERROR && forwards_errors())
		action = forward_error(skb);
	return action == ACTION_RARE ? slowpath_ethernet(skb) : action;
}

/* For interfaces without a link-layer header, such as tun devices. */
SEC("tc")
int udplb_l3(struct __sk_buff *skb)
{
	int action;

	if (EXTRA(decap) && may_have_outer(skb, 0) && decap(skb, 0))
		return TC_ACT_UNSPEC;
	action = run(skb, 0);
	return action == ACTION_RARE ? slowpath_l3(skb) : action;
}

/* Before there is an skb, on interfaces with `xdp`. */
SEC("xdp")
int udplb_xdp(struct xdp_md *xdp)
{
	return run_xdp(xdp);
}

const char LICENSE[] SEC("license") = "Dual BSD/GPL";
