//go:build race

package engines

// race reports whether the tests run with the race detector. If so, their programs do too.
const race = true
