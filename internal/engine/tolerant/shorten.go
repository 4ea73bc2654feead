package tolerant

import "io"

// shortener passes JSON on and replaces each string of more than max bytes, in its encoded form, by
// the empty one. So a decoder, which holds a whole string, never holds a larger one.
type shortener struct {
	src io.Reader
	max int
	cut int // strings that were replaced

	in   []byte // the buffer of src
	out  []byte // to be read, without held
	rest []byte // the part of out that is left
	held []byte // the string that is being read, with its first quote
	err  error

	inside  bool
	escaped bool
	long    bool // the string is too long: held has been dropped
}

const chunk = 16 << 10

// Read implements io.Reader.
func (s *shortener) Read(p []byte) (int, error) {
	for len(s.rest) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		s.fill()
	}

	n := copy(p, s.rest)
	s.rest = s.rest[n:]

	return n, nil
}

// fill reads the next piece. At the end of the input a string that is still open is passed on, so
// that the decoder finds it torn.
func (s *shortener) fill() {
	if s.in == nil {
		s.in = make([]byte, chunk)
	}

	n, err := s.src.Read(s.in)
	s.out = s.out[:0]
	for _, b := range s.in[:n] {
		s.take(b)
	}

	if s.err = err; err != nil {
		s.out = append(s.out, s.held...)
	}

	s.rest = s.out
}

func (s *shortener) take(b byte) {
	if !s.inside {
		if b != '"' {
			s.out = append(s.out, b)
			return
		}
		s.inside, s.long, s.held = true, false, append(s.held[:0], b)
		return
	}

	end := b == '"' && !s.escaped
	s.escaped = b == '\\' && !s.escaped
	if !s.long {
		s.held = append(s.held, b)
		if !end && len(s.held) > s.max+1 {
			s.long, s.held = true, append(s.held[:0], '"')
		}
	} else if end {
		s.held = append(s.held, b)
		s.cut++
	}

	if end {
		s.out = append(s.out, s.held...)
		s.inside, s.held = false, s.held[:0]
	}
}
