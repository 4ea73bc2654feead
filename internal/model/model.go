// Package model defines the records of this program: sandboxes, containers, images and the engine,
// in terms of the CRI. Records are immutable once shared. The package also defines checked types
// for names from outside, and the CRI messages that describe a record.
//
// model is pure: no I/O, clock, logger or context. Every other package may import it; it imports
// only text. Package translate creates records from Docker's responses.
package model
