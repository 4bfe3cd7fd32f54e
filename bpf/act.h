/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is done with a packet of a rule: chosen once, then carried out. */
#ifndef UDPLB_ACT_H
#define UDPLB_ACT_H

/* Where a packet is to go. */
struct choice {
	__u32 upstream; /* index plus one; 0: none */
	__u32 key;	/* that selected it */
	__u64 due;	/* receivers that get a copy, a bit each */
	__u32 identification;
};

/* The key of the rule's strategy. False where the packet is not readable any more. */
static __always_inline bool find_key(struct __sk_buff *skb, __u32 layout, struct packet *packet,
				     const struct rule *rule, __u32 *key)
{
	bool hashed = rule->flags & RULE_HASHES;
	__u64 found;

	if (rule->strategy <= STRATEGY_SRC_IP_PORT) {
		*key = sender_key(packet, rule->strategy, hashed);
		return true;
	}
	if (!features.payload || rule->strategy == STRATEGY_RANDOM) {
		*key = bpf_get_prandom_u32();
		return true;
	}
	found = rule->strategy == STRATEGY_STATSD
			? metric_key(skb, layout)
			: payload_key(skb, layout, rule->payload_offset, rule->payload_length);
	*key = found;
	if (found & KEY_SEVERAL)
		count_aside(skb, layout, 0, rule->id, NOTE_SEVERAL_METRICS);
	if (!(found & KEY_FOUND))
		count_aside(skb, layout, 0, rule->id, NOTE_SHORT_PAYLOAD);
	if (!locate(skb, layout, packet) || !packet->has_udp)
		return false;
	if (!(found & KEY_FOUND))
		*key = sender_key(packet, STRATEGY_SRC_IP_PORT, true);
	return true;
}

static __always_inline bool choose(struct __sk_buff *skb, __u32 layout, struct packet *packet,
				   const struct rule *rule, struct choice *choice)
{
	if (features.receivers && rule->receivers)
		choice->due = due_receivers(rule->first_receiver, rule->receivers);
	if (rule->flags & RULE_REPLICATES)
		return true;
	if (rule->slots > 1 && !find_key(skb, layout, packet, rule, &choice->key))
		return false;
	trace_choice(layout, choice->key, rule->slots);
	choice->upstream = select(rule, choice->key);
	return true;
}

/*
 * What is to be said of several: forwarded if one was, else why the last was not. Without a branch, since the
 * verifier would walk every order in which 64 of them can end.
 */
static __always_inline __u32 both(__u32 before, __u32 sent)
{
	__u32 forwarded = (__s32)(SENT_VERDICT(before) - VERDICT_NO_ROUTE) >> 31;

	return (before & forwarded & 0xff) | (sent & ~forwarded & 0xff) | (sent & ~0xff);
}

/*
 * A copy to each receiver that is due. Returns SENT(); to drop the packet where it could not be left as it
 * came.
 */
__noinline __u32 replicate(struct __sk_buff *skb, __u32 first, __u64 due, __u32 layout, __u32 identification)
{
	__u32 sent = SENT(VERDICT_NO_UPSTREAM, TC_ACT_UNSPEC, 0), i;

	for (i = 0; i < MOST_RECEIVERS && due >> i; i++) {
		if (!(due >> i & 1))
			continue;
		sent = both(sent, send(skb, first + i, layout, identification));
		if (SENT_ACTION(sent) == TC_ACT_SHOT)
			break;
	}
	return sent;
}

/* Whether a sender is to hear of it: not of copies, and of a datagram only once. */
static __always_inline bool is_to_be_told(const struct rule *rule, __u32 layout, __u32 sent)
{
	if (!features.errors || rule->action != ACTION_BLOCK || rule->flags & RULE_OF_GROUP ||
	    layout & LAYOUT_LATER)
		return false;
	return SENT_VERDICT(sent) == VERDICT_TTL || (SENT_VERDICT(sent) == VERDICT_MTU && SENT_MTU(sent));
}

/* Of what replicate() says, what is counted for the rule. */
static __always_inline enum verdict verdict_of_all(const struct rule *rule, enum verdict verdict)
{
	/* how sure the way was is each receiver's own */
	if (verdict == VERDICT_STALE_NEIGHBOUR)
		return VERDICT_FORWARDED;
	/* nor is anything amiss where none was due */
	if (features.receivers && verdict == VERDICT_NO_UPSTREAM &&
	    has_receivers(rule->first_receiver, rule->receivers))
		return VERDICT_FORWARDED;
	return verdict;
}

/* Carries a choice out, and counts. Returns what the program is to return, or ACTION_BACK. */
static __always_inline int act(struct __sk_buff *skb, __u32 layout, const struct rule *rule,
			       const struct choice *choice)
{
	bool block = rule->action == ACTION_BLOCK;
	int action = block ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	__u32 sent = SENT(VERDICT_NO_UPSTREAM, action, 0);
	enum verdict verdict;

	if (features.receivers && choice->due) {
		sent = replicate(skb, rule->first_receiver, choice->due, layout, choice->identification);
		if (SENT_ACTION(sent) == TC_ACT_SHOT)
			action = TC_ACT_SHOT;
	}
	if (rule->flags & RULE_REPLICATES || !choice->upstream) {
		verdict = rule->flags & RULE_REPLICATES ? verdict_of_all(rule, SENT_VERDICT(sent))
							: VERDICT_NO_UPSTREAM;
		count(skb, layout, 0, rule->id, verdict);
		if (layout & LAYOUT_TRACED && verdict == VERDICT_NO_UPSTREAM)
			end_trace(0, verdict);
		return action;
	}
	sent = send(skb, choice->upstream - 1, block ? layout | LAYOUT_GIVE : layout, choice->identification);
	if (is_to_be_told(rule, layout, sent) && make_error(skb, layout, SENT_MTU(sent)))
		return ACTION_BACK;
	return SENT_ACTION(sent);
}

/* It belongs to the rule and goes nowhere. */
static __always_inline int refuse(struct __sk_buff *skb, __u32 layout, const struct rule *rule,
				  enum verdict verdict)
{
	count_aside(skb, layout, 0, rule->id, verdict);
	if (layout & LAYOUT_TRACED)
		end_trace(0, verdict);
	return rule->action == ACTION_BLOCK ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

#endif
