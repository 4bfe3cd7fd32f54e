/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path of flows: a client's packet whose flow goes on, and an upstream's answer to it. Takes no lock
 * and makes and ends nothing. A packet that it does not send is left as it arrived.
 */
#ifndef UDPLB_FLOW_FAST_H
#define UDPLB_FLOW_FAST_H

/* Result of answer_fast() for a packet that answers no flow. */
#define ACTION_NO_ANSWER 106

/* A flow as it was found; the version tells whether it is still the same. */
struct known_flow {
	struct flow_bucket *bucket;
	struct flow *flow;
	__u32 way;
	__u32 version;
};

static __always_inline const __be32 *source_of(const struct pkt *pkt, const bool ipv6)
{
	return ipv6 ? pkt->ip6->saddr.in6_u.u6_addr32 : &pkt->ip->saddr;
}

static __always_inline const __be32 *destination_of(const struct pkt *pkt, const bool ipv6)
{
	return ipv6 ? pkt->ip6->daddr.in6_u.u6_addr32 : &pkt->ip->daddr;
}

/* Points `known` at a flow. Returns false if it is being written. */
static __always_inline bool look_at_flow(struct flow_bucket *bucket, __u32 way, struct known_flow *known,
					 const bool ipv6)
{
	known->bucket = bucket;
	known->way = way;
	known->flow = flow_in(bucket, way, ipv6);
	known->version = version_of(known->flow);
	return !(known->version & 1);
}

/* Returns true if the ends of a flow have the addresses and ports of a packet. */
static __always_inline bool has_ends(const struct flow *flow, const struct pkt *pkt, const enum flow_end from,
				     const enum flow_end to, const bool ipv6)
{
	return flow->ports[from] == pkt->udp->source && flow->ports[to] == pkt->udp->dest &&
	       is_end(end_address(flow, from, ipv6), source_of(pkt, ipv6), ipv6) &&
	       is_end(end_address(flow, to, ipv6), destination_of(pkt, ipv6), ipv6);
}

/* Returns the only way of a bucket that has the tag of a hash; FLOW_WAYS if none or several have. */
static __always_inline __u32 tagged_way(const struct flow_bucket *bucket, __u64 hash)
{
	const __u64 *tags = (const void *)bucket->tags, tag = each_tag(hash);
	__u64 one = zero_tags(tags[0] ^ tag), other = zero_tags(tags[1] ^ tag);
	__u64 found = one | other << 1, way;

	if (!found || found & (found - 1))
		return FLOW_WAYS;
	/* the number of tags before it in its word */
	way = (((one | other) - 1) & EACH_TAG) * EACH_TAG >> 48;
	if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
		way = 3 - way;
	return (way + (other ? 4 : 0)) % FLOW_WAYS;
}

static __always_inline bool find_question(__u32 index, __u64 hash, const struct pkt *pkt, __u32 now,
					  struct known_flow *known, const bool ipv6)
{
	struct flow_bucket *bucket = bucket_at(index, ipv6);
	__u32 way;

	if (!bucket)
		return false;
	way = way_of_hash(hash);
	if (bucket->tags[way] != tag_of(hash))
		way = tagged_way(bucket, hash);
	return way < FLOW_WAYS && look_at_flow(bucket, way, known, ipv6) &&
	       is_alive(bucket->states[way], bucket->touched[way], now, 0) &&
	       has_ends(known->flow, pkt, FLOW_CLIENT, FLOW_VIP, ipv6);
}

/* Finds the flow of a client's packet. Returns false if it has none, and where only a search tells which. */
static __always_inline bool find_known(const struct pkt *pkt, __u32 now, struct known_flow *known,
				       const bool ipv6)
{
	__u64 hash = hash_ends(source_of(pkt, ipv6), destination_of(pkt, ipv6),
			       (__u32)pkt->udp->source << 16 | pkt->udp->dest, ipv6);

	return find_question(scale(hash >> 32, flow_settings.buckets), hash, pkt, now, known, ipv6) ||
	       find_question(scale(mix(hash), flow_settings.buckets), hash, pkt, now, known, ipv6);
}

/* Finds the flow that a packet answers. */
static __always_inline bool find_answered(const struct pkt *pkt, __u32 now, struct known_flow *known,
					  const bool ipv6)
{
	__u32 place = port_place(source_of(pkt, ipv6), destination_of(pkt, ipv6), pkt->udp->source,
				 pkt->udp->dest, ipv6);
	struct port_line *line = port_line_at(place, ipv6);
	__u32 number = line ? hinted_flow(*(volatile __u32 *)&line->hints[hint_index(place)]) : 0;
	struct flow_bucket *bucket = bucket_at(bucket_of(number), ipv6);

	return number && bucket && look_at_flow(bucket, way_of(number), known, ipv6) &&
	       has_ends(known->flow, pkt, FLOW_SERVER, FLOW_EGRESS, ipv6) &&
	       is_alive(known->flow->state, known->flow->touched, now, 0) &&
	       version_of(known->flow) == known->version;
}

/* Returns the upstream that this generation has at the flow's index, if it is the flow's; else NULL. */
static __always_inline const struct upstream *known_upstream_of(const struct flow *flow, __u32 *index,
								const bool ipv6)
{
	const struct upstream *upstream;

	*index = flow->index;
	upstream = bpf_map_lookup_elem(&upstreams, index);
	if (!upstream || upstream->id != flow->upstream || upstream->source != SOURCE_FLOW || !has_port(flow))
		return NULL;
	return is_server(flow, upstream, ipv6) ? upstream : NULL;
}

/* Returns the line of the upstream that a flow goes on with; NULL if the slow path decides. */
static __always_inline struct line *line_of_flow(const struct flow *flow, const struct rule *rule, __u32 now,
						 const bool ipv6)
{
	struct line *line;
	__u32 index;

	if (!known_upstream_of(flow, &index, ipv6) || index - rule->first_upstream >= rule->upstreams ||
	    beats_since(flow->chosen, now) > flow_settings.timeouts[FLOW_NEW] || is_assured_now(flow, now))
		return NULL;
	line = get_line(index);
	return line && !(line->down && rule->flags & RULE_SKIPS_DOWN) ? line : NULL;
}

/* Returns the line in which answers of a flow are counted; NULL if the slow path decides. */
static __always_inline struct line *line_of_answers(const struct flow *flow, const bool ipv6)
{
	const struct upstream *upstream;
	__u32 index;

	/* the first answer changes the flow's state, and the last one ends it */
	if (flow->state == FLOW_NEW || flow->answers_left == 1)
		return NULL;
	upstream = known_upstream_of(flow, &index, ipv6);
	if (!upstream || !upstream->linked)
		return NULL;
	index = upstream->linked;
	return get_line(index);
}

/* Stores the new headers of a packet between two ends of a flow. Returns false if the slow path decides. */
static __always_inline bool fill_known_rewrite(const struct known_flow *known, const enum flow_end from,
					       const enum flow_end to, struct rewrite *rw, const bool ipv6)
{
	copy_address(rw->source, end_address(known->flow, from, ipv6), ipv6);
	copy_address(rw->destination, end_address(known->flow, to, ipv6), ipv6);
	rw->source_port = known->flow->ports[from];
	rw->port = known->flow->ports[to];
	rw->identification = 0;
	/* as is_martian_rewrite() */
	return version_of(known->flow) == known->version && !is_end(rw->source, rw->destination, ipv6) &&
	       !(ipv6 && is_link_local(rw->source));
}

static __always_inline int question_fast(struct __sk_buff *skb, __u32 index, const bool ipv6)
{
	const struct rule *rule = bpf_map_lookup_elem(&rules, &index);
	struct known_flow known;
	__u32 now = beats();
	struct rewrite rw;
	struct line *line;
	struct pkt pkt;

	if (!rule || !locate_plain(skb, &pkt, ipv6) || !is_plain(skb, &pkt, ipv6) ||
	    !find_known(&pkt, now, &known, ipv6))
		return ACTION_SLOW;
	line = line_of_flow(known.flow, rule, now, ipv6);
	if (!line || !serves(line, &pkt) ||
	    !fill_known_rewrite(&known, FLOW_EGRESS, FLOW_SERVER, &rw, ipv6) || !pop_plain(skb, &pkt, ipv6))
		return ACTION_SLOW;
	touch_flow(known.bucket, known.way, known.flow, now);
	known.flow->packets++;
	count_sent(line, 1, skb->len);
	rewrite_plain(skb, &pkt, &rw, rw.destination, line->macs);
	return bpf_redirect(line->ifindex, 0);
}

/* Returns true for the whole answer of an upstream, to this host, that admit_answer() would admit. */
static __always_inline bool is_plain_answer(struct __sk_buff *skb, const struct pkt *pkt, const bool ipv6)
{
	return is_whole(skb) && is_sound(skb->len, pkt, ipv6);
}

/* Returns the line of the way back to a flow's client for a packet; NULL if the slow path asks for the way.
 */
static __always_inline const struct return_line *
valid_return_line(struct __sk_buff *skb, const struct pkt *pkt, const struct rewrite *rw, const bool ipv6)
{
	__u64 hash = return_hash(rw->destination, rw->source, ipv6);
	const struct return_line *line = return_line_at(return_index(hash, false));

	if (line && !is_return_line_of(line, skb, pkt, rw, ipv6)) {
		line = return_line_at(return_index(hash, true));
		if (line && !is_return_line_of(line, skb, pkt, rw, ipv6))
			return NULL;
	}
	return line && is_fresh(line->epoch, line->until) && total_length(pkt) <= line->mtu ? line : NULL;
}

static __always_inline int answer_fast(struct __sk_buff *skb, const bool ipv6)
{
	const struct return_line *way;
	struct known_flow known;
	__u32 now = beats();
	struct rewrite rw;
	struct line *line;
	struct pkt pkt;

	if (!locate_plain(skb, &pkt, ipv6))
		return ACTION_SLOW;
	if (!find_answered(&pkt, now, &known, ipv6))
		return ACTION_NO_ANSWER;
	line = line_of_answers(known.flow, ipv6);
	if (!line || !is_plain_answer(skb, &pkt, ipv6) ||
	    !fill_known_rewrite(&known, FLOW_VIP, FLOW_CLIENT, &rw, ipv6))
		return ACTION_SLOW;
	way = valid_return_line(skb, &pkt, &rw, ipv6);
	if (!way || !pop_plain(skb, &pkt, ipv6))
		return ACTION_SLOW;
	note_answer(known.bucket, known.way, known.flow, now);
	count_sent(line, 1, skb->len);
	rewrite_plain(skb, &pkt, &rw, rw.destination, way->macs);
	return bpf_redirect(way->ifindex, 0);
}

/* Global functions, so that the stack of the fast path stays that of packets without flows. */

/*
 * Sends a client's plain datagram on by its flow; `index` is that of its rule. Returns the action of the
 * program, or ACTION_SLOW.
 */
__noinline int send_question4(struct __sk_buff *skb, __u32 index)
{
	return EXTRA(flows) ? question_fast(skb, index, false) : ACTION_SLOW;
}

__noinline int send_question6(struct __sk_buff *skb, __u32 index)
{
	return EXTRA(flows) && features.ipv6 ? question_fast(skb, index, true) : ACTION_SLOW;
}

/* Sends an upstream's plain datagram on to its client. Returns as above, or ACTION_NO_ANSWER. */
__noinline int send_answer4(struct __sk_buff *skb)
{
	return EXTRA(flows) ? answer_fast(skb, false) : ACTION_SLOW;
}

__noinline int send_answer6(struct __sk_buff *skb)
{
	return EXTRA(flows) && features.ipv6 ? answer_fast(skb, true) : ACTION_SLOW;
}

#endif
