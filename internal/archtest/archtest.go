// Package archtest contains tests of the repository's rules: allowed imports, documented packages,
// the size of functions and files, and banned dependencies. It has no code of its own.
package archtest
