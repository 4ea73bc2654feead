package rpc

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// toStatus returns a status error with the gRPC code for the kind of err. Status errors pass
// unchanged. Errors without a kind are Unknown, as in other runtimes.
func toStatus(err error) error {
	if err == nil {
		return nil
	}

	if s, ok := err.(interface{ GRPCStatus() *status.Status }); ok &&
		s.GRPCStatus() != nil { //nolint:errorlint // a wrapped status error must keep the text around it
		return err
	}

	return status.Error(code(err), err.Error())
}

func code(err error) codes.Code {
	for _, k := range []struct {
		is   func(error) bool
		code codes.Code
	}{
		// The context comes first: an engine's error may be its consequence.
		{func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }, codes.DeadlineExceeded},
		{func(err error) bool { return errors.Is(err, context.Canceled) }, codes.Canceled},
		{errdefs.IsInvalidArgument, codes.InvalidArgument},
		{errdefs.IsNotFound, codes.NotFound},
		{errdefs.IsAlreadyExists, codes.AlreadyExists},
		{errdefs.IsFailedPrecondition, codes.FailedPrecondition},
		{errdefs.IsConflict, codes.FailedPrecondition},
		{errdefs.IsUnavailable, codes.Unavailable},
		{errdefs.IsNotImplemented, codes.Unimplemented},
		{errdefs.IsPermissionDenied, codes.PermissionDenied},
		{errdefs.IsUnauthorized, codes.Unauthenticated},
		{errdefs.IsResourceExhausted, codes.ResourceExhausted},
		{errdefs.IsOutOfRange, codes.OutOfRange},
		{errdefs.IsAborted, codes.Aborted},
		{errdefs.IsDataLoss, codes.DataLoss},
		{errdefs.IsInternal, codes.Internal}, // the engine's status 500
	} {
		if k.is(err) {
			return k.code
		}
	}

	if s, ok := status.FromError(err); ok {
		return s.Code()
	}

	return codes.Unknown
}
