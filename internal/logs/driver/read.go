package driver

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// readConfig selects a part of a log for docker logs (moby's logger.ReadConfig).
type readConfig struct {
	Since, Until time.Time // zero without a bound
	Tail         int       // number of last lines; all if negative
	Follow       bool
}

// reader reads a log and its files rotated by the kubelet, and writes Docker's frames.
type reader struct {
	cfg   readConfig
	log   target
	live  *stream // followed if not nil
	out   io.Writer
	flush func() error

	files []*os.File // oldest first
	skip  int        // number of lines before the last Tail lines
	buf   []byte
}

// errUntil ends the read: the remaining lines are later than Until.
var errUntil = errors.New("later than Until")

// prepare opens the files and finds the start of the last lines.
func (r *reader) prepare(ctx context.Context) error {
	files, err := r.open()
	r.files = files
	if err == nil {
		err = r.skipToLastLines(ctx)
	}
	return err
}

func (r *reader) close() {
	for _, f := range r.files {
		f.Close()
	}
}

// copy writes the log. With a live stream it also writes later lines, until the stream or ctx ends.
func (r *reader) copy(ctx context.Context) error {
	for i, f := range r.files {
		if i == len(r.files)-1 && r.live != nil {
			return r.follow(ctx, f)
		}
		if err := r.copyFile(ctx, f); err != nil {
			return ignoreUntil(err)
		}
	}

	return r.flush()
}

func ignoreUntil(err error) error {
	if errors.Is(err, errUntil) {
		return nil
	}
	return err
}

// open opens the log and its rotated files, oldest first. It opens the log itself first, because
// the log may be renamed meanwhile.
func (r *reader) open() ([]*os.File, error) {
	dir, err := r.log.openDir(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}

	if err != nil {
		return nil, err
	}
	defer dir.Close()

	current, err := openOwn(dir, filepath.Base(r.log.Path), unix.O_RDONLY)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}

	names, err := r.log.listRotated(dir)
	if err != nil {
		closeAll(current)
		return nil, err
	}

	var out []*os.File
	for _, name := range names[max(0, len(names)-maxRead):] {
		f, err := openOwn(dir, name, unix.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errForeign) {
			continue
		}

		if err != nil {
			closeAll(current)
			return out, err
		}

		if current != nil && sameFile(f, current) {
			f.Close()
			continue
		}

		out = append(out, f)
	}

	if current != nil {
		out = append(out, current)
	}

	return out, nil
}

// maxRead limits the number of rotated files to read. The newest ones are read.
const maxRead = 64

// openCurrent opens the current log.
func (r *reader) openCurrent() (*os.File, error) {
	dir, err := r.log.openDir(false)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return openOwn(dir, filepath.Base(r.log.Path), unix.O_RDONLY)
}

func sameFile(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// skipToLastLines drops files and counts lines before the last Tail lines.
func (r *reader) skipToLastLines(ctx context.Context) error {
	if r.cfg.Tail < 0 {
		return nil
	}

	lines, first := 0, len(r.files)
	// Keep the newest file even without one of the last lines, because it may be followed.
	for first > 0 && (lines < r.cfg.Tail || first == len(r.files)) {
		first--
		n, err := countLines(ctx, r.files[first])
		if err != nil {
			return err
		}
		lines += n
	}

	r.skip = lines - r.cfg.Tail
	for _, f := range r.files[:first] {
		f.Close()
	}

	r.files = r.files[first:]

	return nil
}

// openContent returns a file's text from its beginning. It decompresses a file with the suffix .gz.
func openContent(f *os.File) (io.Reader, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if strings.HasSuffix(f.Name(), ".gz") {
		return gzip.NewReader(bufio.NewReader(f))
	}
	return f, nil
}

// maxRecord exceeds the longest record, in bytes.
const maxRecord = pieceSize + 1<<10

// countLines counts the complete lines of a file.
func countLines(ctx context.Context, f *os.File) (n int, err error) {
	text, err := openContent(f)
	if err != nil {
		return 0, err
	}

	for s := bufio.NewReaderSize(text, maxRecord); ; {
		if err := ctx.Err(); err != nil { // a compressed file may be very large
			return n, err
		}

		b, err := s.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return n, nil
		}

		if err != nil {
			return n, err
		}

		if fr, ok := parseRecord(b); ok && !fr.Partial {
			n++
		}
	}
}

func (r *reader) copyFile(ctx context.Context, f *os.File) error {
	text, err := openContent(f)
	if err != nil {
		return err
	}
	_, err = r.copyLines(ctx, bufio.NewReaderSize(text, maxRecord))
	return err
}

// copyLines writes all complete records. It returns the length of an incomplete last record.
func (r *reader) copyLines(ctx context.Context, text *bufio.Reader) (incomplete int, err error) {
	for ctx.Err() == nil {
		b, err := text.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return len(b), nil
		}

		if err != nil {
			return 0, err
		}

		fr, ok := parseRecord(b)
		if !ok {
			continue
		}

		if r.skip > 0 {
			if !fr.Partial {
				r.skip--
			}
			continue
		}

		if !r.cfg.Since.IsZero() && fr.Time < r.cfg.Since.UnixNano() {
			continue
		}
		if !r.cfg.Until.IsZero() && fr.Time > r.cfg.Until.UnixNano() {
			return 0, errUntil
		}

		r.buf = appendFrame(r.buf[:0], fr)
		if _, err := r.out.Write(r.buf); err != nil {
			return 0, err
		}
	}

	return 0, ctx.Err()
}

// follow writes a file and its later lines. It continues in the next file after a rotation.
func (r *reader) follow(ctx context.Context, f *os.File) error {
	defer func() { f.Close() }()

	text := bufio.NewReaderSize(f, maxRecord)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}

	for {
		changed := r.live.changed.next() // before the read, so that no change is missed
		ended := isClosed(r.live.ended)
		current, err := r.openCurrent()
		rotated := err == nil && !sameFile(current, f)
		incomplete, copyErr := r.copyLines(ctx, text)
		if copyErr == nil {
			copyErr = r.flush()
		}

		if copyErr != nil {
			closeAll(current)
			return ignoreUntil(copyErr)
		}

		if rotated && incomplete == 0 {
			f.Close()
			f = current
			text.Reset(f)
			continue
		}

		closeAll(current)
		if ended {
			return nil
		}
		if _, err := f.Seek(-int64(incomplete), io.SeekCurrent); err != nil {
			return err
		}

		text.Reset(f)
		select {
		case <-changed:
		case <-r.live.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func closeAll(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// parseRecord parses a record of the CRI's log format. Docker prints the line unchanged, so a
// complete line keeps its newline.
func parseRecord(b []byte) (f frame, ok bool) {
	stamp, rest, ok := bytes.Cut(b, []byte(" "))
	if !ok {
		return f, false
	}

	source, rest, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return f, false
	}

	tag, line, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return f, false
	}

	t, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil {
		return f, false
	}

	// Colons separate tags. The first tag counts (KEP-1112).
	first, _, _ := bytes.Cut(tag, []byte(":"))
	f = frame{
		Source:  sourceName(source),
		Time:    t.UnixNano(),
		Line:    line,
		Partial: string(first) == tagPartial,
	}
	if f.Partial {
		f.Line = bytes.TrimSuffix(line, []byte("\n"))
	}

	return f, true
}
