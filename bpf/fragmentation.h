/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Fragments IPv4 packets that exceed the MTU and permit it, as a router does (RFC 791, section 3.2). */
#ifndef UDPLB_FRAGMENTATION_H
#define UDPLB_FRAGMENTATION_H

#define MAX_FRAGMENTS 128
#define MAX_DATAGRAM 65535 /* bytes, from offset 0 on */

/* Bytes that one bpf_skb_adjust_room() can remove: it refuses 4096 and more. */
#define MAX_ADJUST 4080

#define OPTION_END 0
#define OPTION_NONE 1
#define OPTION_COPIED 0x80 /* the option is copied into each fragment */

/* Returns the bytes of data in each fragment but the last; 0: the MTU leaves no room. */
static __always_inline __u32 fragment_size(__u32 headers, __u32 mtu)
{
	return mtu > headers ? (mtu - headers) & ~7 : 0;
}

/*
 * Returns the number of fragments of a packet that exceeds the MTU; 0: it must not or cannot be fragmented.
 */
__noinline __u32 count_fragments(struct __sk_buff *skb, __u32 packed, __u32 mtu)
{
	struct pkt pkt = pkt_of(packed);
	__u32 headers = pkt_l4_offset(&pkt) - sizeof(struct ethhdr), size = fragment_size(headers, mtu);
	__u32 length, fragments;

	if (pkt_has(&pkt, PKT_F_IPV6) || !size || skb->gso_size || !pkt_locate(skb, &pkt) ||
	    pkt.ip->frag_off & bpf_htons(IP_DF) || checksum_state(skb, &pkt) == CSUM_INNER_PARTIAL)
		return 0;
	length = bpf_ntohs(pkt.ip->tot_len) - headers;
	/* receivers drop a datagram that is too long */
	if ((bpf_ntohs(pkt.ip->frag_off) & IP_OFFSET) * 8 + length > MAX_DATAGRAM)
		return 0;
	fragments = (length + size - 1) / size;
	return fragments <= MAX_FRAGMENTS ? fragments : 0;
}

/* Loads the options of the IPv4 header into xmit->options, padded with zeroes. */
__noinline __u32 load_options(struct __sk_buff *skb, __u32 headers)
{
	struct xmit *xmit = get_xmit();
	__u32 word;

	if (!xmit)
		return 0;
	__builtin_memset(xmit->options, 0, sizeof(xmit->options));
	for (word = 0; word < MAX_OPTION_WORDS && sizeof(struct iphdr) + word * 4 < headers; word++)
		bpf_skb_load_bytes(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + word * 4,
				   &xmit->options[word], 4);
	return 0;
}

/* Stores xmit->options behind the IPv4 header. */
__noinline __u32 store_options(struct __sk_buff *skb, __u32 headers)
{
	struct xmit *xmit = get_xmit();
	__u32 word;

	for (word = 0; xmit && word < MAX_OPTION_WORDS && sizeof(struct iphdr) + word * 4 < headers; word++)
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + word * 4,
				    &xmit->options[word], 4, 0);
	return 0;
}

/*
 * Replaces the options that only the first fragment has by no-operations (RFC 791, section 3.1); `length` is
 * that of all options. Keeps its state in the map, re-read in each step: before 6.18 the verifier would
 * explore all that follows for each length of an option.
 */
__noinline __u32 blank_options(__u32 length)
{
	struct xmit *xmit = get_xmit();
	__u64 starts, is_none, is_end;
	__u32 i, end, blank;
	__u8 *options;

	if (!xmit)
		return 0;
	options = (__u8 *)xmit->options;
	xmit->option_end = 0;
	for (i = 0; i < MAX_OPTION_WORDS * 4 - 1 && i < length; i++) {
		end = *(volatile __u32 *)&xmit->option_end;
		blank = *(volatile __u32 *)&xmit->option_blank;
		/* no branches: the verifier would explore each of them 39 times */
		starts = 1 - less_than(i, end);
		is_none = is_equal(options[i], OPTION_NONE);
		is_end = starts & is_equal(options[i], OPTION_END);
		end += starts * (i + is_none + (1 - is_none) * options[i + 1] - end);
		blank += starts * (1 - options[i] / OPTION_COPIED - blank);
		/* nothing starts behind the end */
		xmit->option_end = end + is_end * sizeof(xmit->options);
		xmit->option_blank = blank & (1 - is_end);
		options[i] += xmit->option_blank * (OPTION_NONE - options[i]);
	}
	return 0;
}

/*
 * Computes the UDP checksum that was left to the device, which would sum only one fragment. Returns false on
 * failure. Shrinking and growing the packet clears CHECKSUM_PARTIAL, because the checksum's start then lies
 * before the packet's data.
 */
__noinline __u32 complete_checksum(struct __sk_buff *skb, __u32 packed)
{
	const __u32 start = sizeof(struct ethhdr);
	const struct pkt pkt = pkt_of(packed);
	__u32 udp = pkt_l4_offset(&pkt), done, i, left;
	struct xmit *xmit = get_xmit();
	__u64 sum = 0;
	__u16 check;

	if (!xmit || skb->len <= udp)
		return false;
	for (i = 0, done = 0; i < 54 && udp + done < skb->len; i++, done += MAX_SUM_BYTES) {
		left = skb->len - udp - done;
		sum += sum_bytes(skb, udp + done, left < MAX_SUM_BYTES ? left : MAX_SUM_BYTES);
	}
	check = (__u16)~fold16(sum) ?: 0xffff;
	return !bpf_skb_store_bytes(skb, udp + offsetof(struct udphdr, check), &check, sizeof(check), 0) &&
	       !bpf_skb_load_bytes(skb, start, xmit->shifted, SHIFTED_BYTES) &&
	       !bpf_skb_adjust_room(skb, -SHIFTED_BYTES, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_adjust_room(skb, SHIFTED_BYTES, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, start, xmit->shifted, SHIFTED_BYTES, 0);
}

/* Removes bytes behind the Ethernet header. Returns false on failure. */
__noinline __u32 remove_bytes(struct __sk_buff *skb, __u32 bytes)
{
	int i;

	for (i = 0; i < 16 && bytes > MAX_ADJUST; i++) {
		if (bpf_skb_adjust_room(skb, -MAX_ADJUST, BPF_ADJ_ROOM_MAC, 0))
			return false;
		bytes -= MAX_ADJUST;
	}
	return !bytes || !bpf_skb_adjust_room(skb, -(__s32)bytes, BPF_ADJ_ROOM_MAC, 0);
}

/*
 * Writes the IPv4 header of a fragment with `length` bytes of data at `offset`; `more` is 0 or IP_MF.
 * `headers` is the header's length. Returns false on failure.
 */
static __always_inline bool write_fragment_header(struct __sk_buff *skb, __u32 headers, struct iphdr *ip,
						  __u32 offset, __u32 length, __u32 more, struct xmit *xmit)
{
	__u16 fragment = bpf_ntohs(ip->frag_off) & IP_OFFSET;

	if (offset)
		blank_options(headers - sizeof(*ip));
	ip->frag_off = bpf_htons(fragment + offset / 8 + more);
	ip->tot_len = bpf_htons(headers + length);
	ip->check = 0;
	ip->check = ~fold16(sum_words(ip, sizeof(*ip)) + sum_words(xmit->options, MAX_OPTION_WORDS * 4));
	if (bpf_skb_store_bytes(skb, sizeof(struct ethhdr), ip, sizeof(*ip), 0))
		return false;
	store_options(skb, headers);
	return true;
}

/* Cuts a packet down to its fragment with that number for that MTU. Returns false on failure. */
__noinline __u32 make_fragment(struct __sk_buff *skb, __u32 packed, __u32 number, __u32 mtu)
{
	const struct pkt pkt = pkt_of(packed);
	__u32 headers = pkt_l4_offset(&pkt) - sizeof(struct ethhdr), size = fragment_size(headers, mtu);
	__u32 offset = number * size, length, more, checksum = checksum_state(skb, &pkt);
	struct xmit *xmit = get_xmit();
	struct iphdr ip;

	if (!xmit || headers < sizeof(ip) || bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &ip, sizeof(ip)))
		return false;
	length = bpf_ntohs(ip.tot_len) - headers - offset;
	if (!size || number >= MAX_FRAGMENTS || (__s32)length <= 0)
		return false;
	more = bpf_ntohs(ip.frag_off) & IP_MF;
	if (length > size) {
		length = size;
		more = IP_MF;
	}
	if (checksum == CSUM_COMPLETE)
		drop_csum_complete(skb);
	if (checksum == CSUM_PARTIAL && !number && !complete_checksum(skb, packed))
		return false;
	load_options(skb, headers);
	return !bpf_skb_change_tail(skb, pkt_l4_offset(&pkt) + offset + length, 0) &&
	       remove_bytes(skb, offset) &&
	       write_fragment_header(skb, headers, &ip, offset, length, more, xmit);
}

#endif
