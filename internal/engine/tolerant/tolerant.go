// Package tolerant decodes JSON whose size and content others control, such as the engine's
// answers: an image's author writes most of what an inspect says of its containers. It reads a
// stream with bounded memory, keeps the fields of the target type only, and leaves out what does
// not fit there. Errors are left to what no decoder can get around: torn input and broken syntax.
package tolerant

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
)

// Limits bound what a decoder keeps. All are in bytes and must be set.
type Limits struct {
	Text  int // of one string; a longer one is left out
	Group int // of one list or map with all below it; further elements are left out
	Total int // of all strings of one call; more is ErrTooLarge
	// Keep says of a map's key that its entry is kept whatever the group holds already, with a text
	// of up to KeptText. Nil for none.
	Keep     func(key string) bool
	KeptText int
}

// ErrTooLarge is the error of an answer that holds more than Limits.Total, or that is nested deeper
// than any answer.
var ErrTooLarge = errors.New("the answer is too large")

const (
	maxDepth    = 1000    // of nested lists and objects
	maxElements = 1 << 17 // of a list that Each reads
	maxLeft     = 8       // paths that are reported
	overhead    = 16      // bytes that an element of a group counts beside its text
)

// Decode reads one JSON value into target, a non-nil pointer. It returns the paths of the fields
// that were left out, at most maxLeft.
func Decode(r io.Reader, target any, l Limits) (left []string, err error) {
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

// Each reads a JSON list and calls use for each element, with the paths of the fields that were
// left out of it. One element is in memory at a time. An element that is no object is left out.
// Each stops at the first error of use.
func Each[T any](r io.Reader, l Limits, use func(element *T, left []string) error) error {
	d := newDecoder(r, l)
	tok, err := d.token()
	if err != nil || tok == nil {
		return err
	}

	if tok != json.Delim('[') {
		return errors.Join(errors.New("the answer is no list"), d.skip(tok))
	}

	for n := 0; ; n++ {
		tok, err := d.token()
		switch {
		case err != nil:
			return err
		case tok == json.Delim(']'):
			return nil
		case n >= maxElements:
			return fmt.Errorf("more than %d elements: %w", maxElements, ErrTooLarge)
		case tok != json.Delim('{'):
			if err := d.skip(tok); err != nil {
				return err
			}
			continue
		}

		d.left, d.short.cut = nil, 0
		var element T
		if err := d.value(tok, reflect.ValueOf(&element).Elem(), "", nil); err != nil {
			return err
		}

		if err := use(&element, d.report()); err != nil {
			return err
		}
	}
}

// Sequence reads JSON objects that follow each other until the input ends, and calls use for each.
// Limits.Total is for each one. Values that are no objects are left out. Sequence stops at the
// first error of use.
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

		d.left, d.kept = nil, 0
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
	json   *json.Decoder
	short  *shortener
	limits Limits
	kept   int      // bytes of texts
	lost   int      // fields that were left out
	left   []string // the first of their paths
}

func newDecoder(r io.Reader, l Limits) *decoder {
	l.KeptText = max(l.KeptText, l.Text)
	short := &shortener{src: r, max: l.KeptText}
	d := &decoder{json: json.NewDecoder(short), short: short, limits: l}
	d.json.UseNumber()
	return d
}

// token is the next token. The end of the input within a value is io.ErrUnexpectedEOF.
func (d *decoder) token() (json.Token, error) {
	tok, err := d.json.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return tok, err
}

// leave notes a field that is left out.
func (d *decoder) leave(path string) {
	d.lost++
	if len(d.left) < maxLeft {
		d.left = append(d.left, path)
	}
}

func (d *decoder) report() []string {
	if d.short.cut > 0 {
		d.leave(fmt.Sprintf("%d texts of more than %d bytes", d.short.cut, d.short.max))
	}
	return d.left
}

// keep counts a text against the total.
func (d *decoder) keep(n int) error {
	if d.kept += n; d.kept > d.limits.Total {
		return fmt.Errorf("more than %d bytes: %w", d.limits.Total, ErrTooLarge)
	}
	return nil
}

// skip reads the rest of a value whose first token is tok.
func (d *decoder) skip(tok json.Token) error {
	for depth := 0; ; {
		switch tok {
		case json.Delim('{'), json.Delim('['):
			if depth++; depth > maxDepth {
				return fmt.Errorf("nested deeper than %d: %w", maxDepth, ErrTooLarge)
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
