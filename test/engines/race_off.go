//go:build !race

package engines

// race says that the tests run with the race detector; then the programs that they start do too.
const race = false
