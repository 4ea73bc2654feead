package nri

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	nrilog "github.com/containerd/nri/pkg/log"

	"cri-dockerd/internal/text"
)

// logger logs for NRI's library. Its messages contain text of plugins. The library has one logger
// for the process, which its goroutines use at any time. So it is set once, and its target later.
type logger struct{ target atomic.Pointer[slog.Logger] }

var (
	global  logger
	globals sync.Once
)

// setLog sets the target of the library's messages.
func setLog(log *slog.Logger) {
	global.target.Store(log)
	globals.Do(func() { nrilog.Set(&global) })
}

func (l *logger) write(ctx context.Context, level slog.Level, format string, args []any) {
	log := l.target.Load()
	if ctx == nil || !log.Enabled(ctx, level) {
		return
	}
	log.Log(ctx, level, "NRI: "+text.Clean(fmt.Sprintf(format, args...), text.MaxMessage))
}

// Debugf implements NRI's log.Logger.
func (l *logger) Debugf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

// Infof implements NRI's log.Logger.
func (l *logger) Infof(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelInfo, format, args)
}

// Warnf implements NRI's log.Logger.
func (l *logger) Warnf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelWarn, format, args)
}

// Errorf implements NRI's log.Logger.
func (l *logger) Errorf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelError, format, args)
}
