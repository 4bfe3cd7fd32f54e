/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Declarations of <argp.h>, which musl does not have: elfutils compiles the option parser of its
 * command line tools beside libelf. Nothing links it, so declarations are enough.
 */
#ifndef ARGP_H
#define ARGP_H

#include <errno.h>
#include <stdio.h>

#define ARGP_HELP_SEE 0
#define ARGP_ERR_UNKNOWN E2BIG
#define OPTION_ARG_OPTIONAL 1

typedef int error_t;

struct argp_state {
	const char *name;
};

struct argp_option {
	const char *name;
	int key;
	const char *arg;
	int flags;
	const char *doc;
	int group;
};

struct argp {
	const struct argp_option *options;
	error_t (*parser)(int key, char *arg, struct argp_state *state);
	const char *args_doc;
	const char *doc;
	const void *children;
	const void *help_filter;
	const char *domain;
};

void argp_help(const struct argp *argp, FILE *stream, unsigned int flags, char *name);

#endif
