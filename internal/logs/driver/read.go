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

// readConfig selects the part of a log for docker logs (moby's logger.ReadConfig).
type readConfig struct {
	Since, Until time.Time // zero without a bound
	Tail         int       // the last lines only; below 0 all
	Follow       bool
}

// reader reads a log, with the files that the kubelet has rotated, and writes it as Docker's
// frames.
type reader struct {
	cfg   readConfig
	log   target
	live  *stream // followed if not nil
	out   io.Writer
	flush func() error

	files []*os.File // the oldest first
	skip  int        // lines that are not among the last
	buf   []byte
}

// errUntil ends the reading: the rest of the log is later than Until.
var errUntil = errors.New("later than Until")

// prepare finds the last lines, as of now.
func (r *reader) prepare(ctx context.Context) error {
	files, err := r.open()
	r.files = files
	if err == nil {
		err = r.lastLines(ctx)
	}
	return err
}

func (r *reader) close() {
	for _, f := range r.files {
		f.Close()
	}
}

// copy writes the log and, when a live stream is followed, also later lines until the stream or ctx
// ends.
func (r *reader) copy(ctx context.Context) error {
	for i, f := range r.files {
		if i == len(r.files)-1 && r.live != nil {
			return r.follow(ctx, f)
		}
		if err := r.copyFile(ctx, f); err != nil {
			return done(err)
		}
	}

	return r.flush()
}

func done(err error) error {
	if errors.Is(err, errUntil) {
		return nil
	}
	return err
}

// open opens the log and all rotated files, and returns the oldest first. It opens the log first,
// since that may be renamed meanwhile.
func (r *reader) open() ([]*os.File, error) {
	dir, err := r.log.directory(false)
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

	names, err := r.log.rotated(dir)
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

// maxRead is how many rotated files are read, the newest ones.
const maxRead = 64

// openCurrent opens the log as it is now.
func (r *reader) openCurrent() (*os.File, error) {
	dir, err := r.log.directory(false)
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

// lastLines drops the files, and counts the lines, that are not among the last Tail lines.
func (r *reader) lastLines(ctx context.Context) error {
	if r.cfg.Tail < 0 {
		return nil
	}

	lines, first := 0, len(r.files)
	// The newest file stays even if none of its lines is among the last: it may be followed.
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

// content returns a file's text from its beginning, decompressed if its name ends in .gz.
func content(f *os.File) (io.Reader, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if strings.HasSuffix(f.Name(), ".gz") {
		return gzip.NewReader(bufio.NewReader(f))
	}
	return f, nil
}

// maxRecord is more than the longest record, in bytes.
const maxRecord = pieceSize + 1<<10

// countLines counts the whole lines of a file.
func countLines(ctx context.Context, f *os.File) (n int, err error) {
	text, err := content(f)
	if err != nil {
		return 0, err
	}

	for s := bufio.NewReaderSize(text, maxRecord); ; {
		if err := ctx.Err(); err != nil { // a compressed file may hold a lot
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
	text, err := content(f)
	if err != nil {
		return err
	}
	_, err = r.copyLines(ctx, bufio.NewReaderSize(text, maxRecord))
	return err
}

// copyLines writes all whole records. rest is the length of the last one, which is not yet whole.
func (r *reader) copyLines(ctx context.Context, text *bufio.Reader) (rest int, err error) {
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

// follow writes a file and the lines that are added to it. It goes on in the next file when the log
// is rotated.
func (r *reader) follow(ctx context.Context, f *os.File) error {
	defer func() { f.Close() }()

	text := bufio.NewReaderSize(f, maxRecord)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}

	for {
		changed := r.live.changed.next() // before the file is read, so that no change is missed
		ended := isClosed(r.live.ended)
		current, err := r.openCurrent()
		rotated := err == nil && !sameFile(current, f)
		rest, copyErr := r.copyLines(ctx, text)
		if copyErr == nil {
			copyErr = r.flush()
		}

		if copyErr != nil {
			closeAll(current)
			return done(copyErr)
		}

		if rotated && rest == 0 {
			f.Close()
			f = current
			text.Reset(f)
			continue
		}

		closeAll(current)
		if ended {
			return nil
		}
		if _, err := f.Seek(-int64(rest), io.SeekCurrent); err != nil {
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

// parseRecord reads a record of the CRI's log format. Docker prints the line as it gets it, so a
// whole one keeps its newline.
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

	// Tags are separated by colons; the first one counts (KEP-1112).
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
