/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* SipHash-2-4 of whole 64-bit words (Aumasson and Bernstein, 2012): a hash keyed by a 128-bit secret. */
#ifndef UDPLB_SIPHASH_H
#define UDPLB_SIPHASH_H

/* State of a hash computation. */
struct siphash {
	__u64 v[4];
	__u64 words; /* added so far */
};

static __always_inline __u64 rotate(__u64 word, const int bits)
{
	return word << bits | word >> (64 - bits);
}

static __always_inline void siphash_rounds(struct siphash *hash, const int rounds)
{
	__u64 *v = hash->v;
	int round;

#pragma unroll
	for (round = 0; round < rounds; round++) {
		v[0] += v[1];
		v[2] += v[3];
		v[1] = rotate(v[1], 13) ^ v[0];
		v[3] = rotate(v[3], 16) ^ v[2];
		v[0] = rotate(v[0], 32);
		v[2] += v[1];
		v[0] += v[3];
		v[1] = rotate(v[1], 17) ^ v[2];
		v[3] = rotate(v[3], 21) ^ v[0];
		v[2] = rotate(v[2], 32);
	}
}

/* Starts a hash under a secret of two words. */
static __always_inline void siphash_start(struct siphash *hash, const __u64 *secret)
{
	hash->v[0] = secret[0] ^ 0x736f6d6570736575ULL;
	hash->v[1] = secret[1] ^ 0x646f72616e646f6dULL;
	hash->v[2] = secret[0] ^ 0x6c7967656e657261ULL;
	hash->v[3] = secret[1] ^ 0x7465646279746573ULL;
	hash->words = 0;
}

static __always_inline void siphash_add(struct siphash *hash, __u64 word)
{
	hash->v[3] ^= word;
	siphash_rounds(hash, 2);
	hash->v[0] ^= word;
	hash->words++;
}

/* Returns the hash; nothing can be added afterwards. */
static __always_inline __u64 siphash_end(struct siphash *hash)
{
	siphash_add(hash, hash->words * sizeof(__u64) << 56);
	hash->v[2] ^= 0xff;
	siphash_rounds(hash, 4);
	return hash->v[0] ^ hash->v[1] ^ hash->v[2] ^ hash->v[3];
}

#endif
