// Package archtest holds the tests that police the repository: which package may import which, that
// every package says what it is for, that no function grows past what one can read, and what must
// never be linked. It has no code of its own.
package archtest
