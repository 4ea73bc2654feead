// Package tolerant decodes untrusted JSON, such as the engine's responses: image authors control
// most fields in the inspect response of a container. It reads a stream with bounded memory, keeps
// only the fields of the target type, and skips values of the wrong type or size. It returns errors
// only for truncated input, broken syntax and input beyond Limits.Total.
package tolerant

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
)

// Limits bound the memory of a decoded value, in bytes. All must be set, except for Keep and
// KeptText.
type Limits struct {
	Text  int // maximum of one string; longer ones are skipped
	Group int // maximum of one list or map with everything below it; further elements are skipped
	Total int // maximum of all strings of one call; beyond it, ErrTooLarge is returned
	// Keep reports whether to keep the map entry with this key even if Group is exhausted. The
	// value of such an entry may have up to KeptText bytes. Nil keeps none.
	Keep     func(key string) bool
	KeptText int
}

// ErrTooLarge is the error of a response beyond Limits.Total, maxElements or maxDepth.
var ErrTooLarge = errors.New("response is too large")

const (
	maxDepth    = 1000    // of nested lists and objects
	maxElements = 1 << 17 // of a list read by Each
	maxReported = 8       // reported paths of skipped fields
	overhead    = 16      // bytes counted for an element of a group in addition to its text
)

// Decode reads one JSON value into target, a non-nil pointer. It returns the paths of the skipped
// fields, at most maxReported.
func Decode(r io.Reader, target any, l Limits) (skipped []string, err error) {
	d := newDecoder(r, l)
	tok, err := d.token()
	if err != nil {
		return nil, err
	}

	if err := d.value(tok, reflect.ValueOf(target).Elem(), "", nil); err != nil {
		return nil, err
	}

	return d.report(), nil
}

// Each reads a JSON list and calls use for each element, together with the paths of its skipped
// fields. It holds one element in memory at a time and skips elements other than objects. It stops
// at the first error of use.
func Each[T any](r io.Reader, l Limits, use func(element *T, skipped []string) error) error {
	d := newDecoder(r, l)
	tok, err := d.token()
	if err != nil || tok == nil {
		return err
	}

	if tok != json.Delim('[') {
		return errors.Join(errors.New("response is not a list"), d.skip(tok))
	}

	for n := 0; ; n++ {
		tok, err := d.token()
		switch {
		case err != nil:
			return err
		case tok == json.Delim(']'):
			return nil
		case n >= maxElements:
			return fmt.Errorf("%w: more than %d elements", ErrTooLarge, maxElements)
		case tok != json.Delim('{'):
			if err := d.skip(tok); err != nil {
				return err
			}
			continue
		}

		d.skipped, d.short.cut = nil, 0
		var element T
		if err := d.value(tok, reflect.ValueOf(&element).Elem(), "", nil); err != nil {
			return err
		}

		if err := use(&element, d.report()); err != nil {
			return err
		}
	}
}

// Sequence reads a stream of concatenated JSON objects until the input ends, and calls use for
// each. Limits.Total applies to each object. Sequence skips values other than objects and stops at
// the first error of use.
func Sequence[T any](r io.Reader, l Limits, use func(message *T) error) error {
	d := newDecoder(r, l)
	for {
		tok, err := d.json.Token()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case tok != json.Delim('{'):
			if err := d.skip(tok); err != nil {
				return err
			}
			continue
		}

		d.skipped, d.size = nil, 0
		var message T
		if err := d.value(tok, reflect.ValueOf(&message).Elem(), "", nil); err != nil {
			return err
		}

		if err := use(&message); err != nil {
			return err
		}
	}
}

// decoder is the state of one call.
type decoder struct {
	json    *json.Decoder
	short   *shortener
	limits  Limits
	size    int      // total bytes of all strings so far
	lost    int      // number of skipped fields
	skipped []string // paths of the first maxReported skipped fields
}

func newDecoder(r io.Reader, l Limits) *decoder {
	l.KeptText = max(l.KeptText, l.Text)
	short := &shortener{src: r, max: l.KeptText}
	d := &decoder{json: json.NewDecoder(short), short: short, limits: l}
	d.json.UseNumber()
	return d
}

// token returns the next token. At the end of the input it returns io.ErrUnexpectedEOF, because a
// value is incomplete.
func (d *decoder) token() (json.Token, error) {
	tok, err := d.json.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return tok, err
}

// recordSkipped records a skipped field.
func (d *decoder) recordSkipped(path string) {
	d.lost++
	if len(d.skipped) < maxReported {
		d.skipped = append(d.skipped, path)
	}
}

// report returns the paths of the skipped fields, with a summary of the shortened strings.
func (d *decoder) report() []string {
	if d.short.cut > 0 {
		d.recordSkipped(fmt.Sprintf("%d strings longer than %d bytes", d.short.cut, d.short.max))
	}
	return d.skipped
}

// addSize counts n bytes of text against Limits.Total.
func (d *decoder) addSize(n int) error {
	if d.size += n; d.size > d.limits.Total {
		return fmt.Errorf("%w: more than %d bytes", ErrTooLarge, d.limits.Total)
	}
	return nil
}

// skip discards a value. Its first token, tok, has already been read.
func (d *decoder) skip(tok json.Token) error {
	for depth := 0; ; {
		switch tok {
		case json.Delim('{'), json.Delim('['):
			if depth++; depth > maxDepth {
				return fmt.Errorf("%w: nested more than %d levels deep", ErrTooLarge, maxDepth)
			}
		case json.Delim('}'), json.Delim(']'):
			depth--
		}

		if depth <= 0 {
			return nil
		}

		var err error
		if tok, err = d.token(); err != nil {
			return err
		}
	}
}
