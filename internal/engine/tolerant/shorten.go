package tolerant

import "io"

// shortener is a reader of JSON. It replaces each string of more than max bytes, measured in
// encoded form, by the empty string. This bounds the memory of a json.Decoder, which buffers whole
// strings.
type shortener struct {
	src io.Reader
	max int
	cut int // number of replaced strings

	in     []byte // read buffer of src
	out    []byte // output, without held
	unread []byte // the part of out not yet read
	held   []byte // the current string with its opening quote
	err    error

	inside  bool // inside a string
	escaped bool // after a backslash
	long    bool // the string is too long, and its content was dropped from held
}

const chunkSize = 16 << 10

// Read implements io.Reader.
func (s *shortener) Read(p []byte) (int, error) {
	for len(s.unread) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		s.fill()
	}

	n := copy(p, s.unread)
	s.unread = s.unread[n:]

	return n, nil
}

// fill reads the next chunk. At the end of the input it passes on an unterminated string, so that
// the decoder reports the truncation.
func (s *shortener) fill() {
	if s.in == nil {
		s.in = make([]byte, chunkSize)
	}

	n, err := s.src.Read(s.in)
	s.out = s.out[:0]
	for _, b := range s.in[:n] {
		s.take(b)
	}

	if s.err = err; err != nil {
		s.out = append(s.out, s.held...)
	}

	s.unread = s.out
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
