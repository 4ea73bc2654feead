package nri

import (
	"context"
	"fmt"
	"log/slog"

	"cri-dockerd/internal/text"
)

// logger logs for NRI's library. Its messages contain text of plugins.
type logger struct{ log *slog.Logger }

func (l logger) write(ctx context.Context, level slog.Level, format string, args []any) {
	if ctx == nil || !l.log.Enabled(ctx, level) {
		return
	}
	l.log.Log(ctx, level, "NRI: "+text.Clean(fmt.Sprintf(format, args...), text.MaxMessage))
}

// Debugf implements NRI's log.Logger.
func (l logger) Debugf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

// Infof implements NRI's log.Logger.
func (l logger) Infof(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelInfo, format, args)
}

// Warnf implements NRI's log.Logger.
func (l logger) Warnf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelWarn, format, args)
}

// Errorf implements NRI's log.Logger.
func (l logger) Errorf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelError, format, args)
}
