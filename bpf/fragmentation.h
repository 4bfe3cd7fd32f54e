/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Fragments of IPv4 packets that are too large for their way and may be cut, as a router makes them (RFC 791,
 * section 3.2). */
#ifndef UDPLB_FRAGMENTATION_H
#define UDPLB_FRAGMENTATION_H

#define MOST_PIECES 128
#define LONGEST_DATAGRAM 65535

/* Bytes that one bpf_skb_adjust_room() removes: the helper refuses 4096 and more. */
#define REMOVED_AT_ONCE 4080

#define OPTION_END 0
#define OPTION_NONE 1
#define OPTION_COPIED 0x80 /* into each fragment */

/* Bytes of data in each fragment but the last. */
static __always_inline __u32 piece_size(__u32 headers, __u32 mtu)
{
	return mtu > headers ? (mtu - headers) & ~7 : 0;
}

/* Returns the number of fragments of a packet that does not fit; 0: it is not to be cut, or cannot be. */
__noinline __u32 pieces_of(struct __sk_buff *skb, __u32 layout, __u32 mtu)
{
	__u32 headers = (layout & LAYOUT_UDP) - sizeof(struct ethhdr), size = piece_size(headers, mtu);
	struct packet packet;
	__u32 length, pieces;

	if (layout & LAYOUT_IPV6 || !size || skb->gso_size || !locate(skb, layout, &packet) ||
	    packet.ip->frag_off & bpf_htons(IP_DF) || checksum_of(skb, layout) == CHECKSUM_INSIDE)
		return 0;
	length = bpf_ntohs(packet.ip->tot_len) - headers;
	/* what ends behind the longest datagram is nobody's */
	if ((bpf_ntohs(packet.ip->frag_off) & IP_OFFSET) * 8 + length > LONGEST_DATAGRAM)
		return 0;
	pieces = (length + size - 1) / size;
	return pieces <= MOST_PIECES ? pieces : 0;
}

/* Loads the options of the IP header into `sending`, with zeroes behind them. */
__noinline __u32 load_options(struct __sk_buff *skb, __u32 headers)
{
	struct sending *sending = get_sending();
	__u32 word;

	if (!sending)
		return 0;
	__builtin_memset(sending->options, 0, sizeof(sending->options));
	for (word = 0; word < MOST_OPTIONS && sizeof(struct iphdr) + word * 4 < headers; word++)
		bpf_skb_load_bytes(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + word * 4,
				   &sending->options[word], 4);
	return 0;
}

__noinline __u32 store_options(struct __sk_buff *skb, __u32 headers)
{
	struct sending *sending = get_sending();
	__u32 word;

	for (word = 0; sending && word < MOST_OPTIONS && sizeof(struct iphdr) + word * 4 < headers; word++)
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + word * 4,
				    &sending->options[word], 4, 0);
	return 0;
}

/*
 * Replaces the options that only the first fragment has (RFC 791, section 3.1). What is known of an option is
 * in the map: before 6.18 the verifier would go on once for each length that it may have.
 */
__noinline __u32 blank_options(__u32 length)
{
	struct sending *sending = get_sending();
	__u8 *options;
	__u32 i;

	if (!sending)
		return 0;
	options = (__u8 *)sending->options;
	sending->option_end = 0;
	for (i = 0; i < MOST_OPTIONS * 4 - 1 && i < length; i++) {
		if (i >= *(volatile __u32 *)&sending->option_end) {
			if (options[i] == OPTION_END)
				break;
			sending->option_end = i + (options[i] == OPTION_NONE ? 1 : options[i + 1]);
			sending->option_blank = !(options[i] & OPTION_COPIED);
		}
		if (*(volatile __u32 *)&sending->option_blank)
			options[i] = OPTION_NONE;
	}
	return 0;
}

/*
 * Fills in the UDP checksum that a device was to compute, which would sum up the bytes of one fragment. What
 * begins before the packet's data no device computes any more: it is moved there and back.
 */
__noinline __u32 complete_checksum(struct __sk_buff *skb, __u32 layout)
{
	const __u32 start = sizeof(struct ethhdr);
	__u32 udp = layout & LAYOUT_UDP, done, i, left;
	struct sending *sending = get_sending();
	__u64 sum = 0;
	__u16 check;

	if (!sending || skb->len <= udp)
		return false;
	for (i = 0, done = 0; i < 54 && udp + done < skb->len; i++, done += SUMMED) {
		left = skb->len - udp - done;
		sum += sum_of(skb, udp + done, left < SUMMED ? left : SUMMED);
	}
	check = (__u16)~fold16(sum) ?: 0xffff;
	return !bpf_skb_store_bytes(skb, udp + offsetof(struct udphdr, check), &check, sizeof(check), 0) &&
	       !bpf_skb_load_bytes(skb, start, sending->shifted, SHIFTED) &&
	       !bpf_skb_adjust_room(skb, -SHIFTED, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_adjust_room(skb, SHIFTED, BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, start, sending->shifted, SHIFTED, 0);
}

/* Removes so many bytes behind the Ethernet header. */
__noinline __u32 remove_bytes(struct __sk_buff *skb, __u32 bytes)
{
	__s32 part;
	int i;

	for (i = 0; i < 17 && bytes; i++) {
		part = bytes < REMOVED_AT_ONCE ? bytes : REMOVED_AT_ONCE;
		if (bpf_skb_adjust_room(skb, -part, BPF_ADJ_ROOM_MAC, 0))
			return false;
		bytes -= part;
	}
	return true;
}

/* Writes the header of a fragment of `length` bytes; `offset` and `more` are the fragment's. */
static __always_inline bool write_header(struct __sk_buff *skb, __u32 headers, struct iphdr *ip, __u32 offset,
					 __u32 length, __u32 more, struct sending *sending)
{
	__u16 fragment = bpf_ntohs(ip->frag_off) & IP_OFFSET;

	if (offset)
		blank_options(headers - sizeof(*ip));
	ip->frag_off = bpf_htons(fragment + offset / 8 + more);
	ip->tot_len = bpf_htons(headers + length);
	ip->check = 0;
	ip->check = ~fold16(sum_words(ip, sizeof(*ip)) + sum_words(sending->options, MOST_OPTIONS * 4));
	if (bpf_skb_store_bytes(skb, sizeof(struct ethhdr), ip, sizeof(*ip), 0))
		return false;
	store_options(skb, headers);
	return true;
}

/* Makes of a packet the fragment with that number, for that MTU. */
__noinline __u32 cut(struct __sk_buff *skb, __u32 layout, __u32 piece, __u32 mtu)
{
	__u32 headers = (layout & LAYOUT_UDP) - sizeof(struct ethhdr), size = piece_size(headers, mtu);
	__u32 offset = piece * size, length, more, checksum = checksum_of(skb, layout);
	struct sending *sending = get_sending();
	struct iphdr ip;

	if (!sending || headers < sizeof(ip) ||
	    bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &ip, sizeof(ip)))
		return false;
	length = bpf_ntohs(ip.tot_len) - headers - offset;
	if (!size || piece >= MOST_PIECES || (__s32)length <= 0)
		return false;
	more = bpf_ntohs(ip.frag_off) & IP_MF;
	if (length > size) {
		length = size;
		more = IP_MF;
	}
	if (checksum == CHECKSUM_OF_FRAME)
		forget_sum(skb);
	if (checksum == CHECKSUM_BY_DEVICE && !piece && !complete_checksum(skb, layout))
		return false;
	load_options(skb, headers);
	return !bpf_skb_change_tail(skb, (layout & LAYOUT_UDP) + offset + length, 0) &&
	       remove_bytes(skb, offset) && write_header(skb, headers, &ip, offset, length, more, sending);
}

#endif
