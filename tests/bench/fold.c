// SPDX-License-Identifier: Apache-2.0
/*
 * The fold of the shim itself: reads PCs from stdin, 64 bits each, and says what became of them.
 *
 *	fold edges|blocks CELLS ROUNDS
 *
 * Prints the cells that were set, and the nanoseconds of a PC over all rounds.
 */
#define main shim_main
#include "kcov-shim.c"
#undef main

int main(int argc, char **argv)
{
	static uint64_t pcs[1 << 24];
	struct kb_board page = { 0 };
	uint64_t start, number, rounds, i;

	if (argc != 4)
		return 2;
	board = &page;
	cells = strtoull(argv[2], NULL, 10);
	rounds = strtoull(argv[3], NULL, 10);
	map = calloc(1, cells);
	seen = calloc(1, cells);
	number = fread(pcs, sizeof(*pcs), sizeof(pcs) / sizeof(*pcs), stdin);
	if (!map || !seen || !number)
		return 2;
	start = now();
	for (i = 0; i < rounds; i++)
		fold_area(pcs, number, !strcmp(argv[1], "edges"));
	printf("%llu %.3f\n", (unsigned long long)page.cells,
	       (double)(now() - start) / (double)(number * rounds));
	return 0;
}
